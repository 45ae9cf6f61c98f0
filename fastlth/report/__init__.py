"""From runs to pictures: reads run directories, tickets and metrics, and writes pages, tables and pictures.

subject     what is reported on: a run, its replicates, or a ticket file
figure      a picture as plain numbers: the picture, its CSV and the table in the page are all made of it
curves      accuracy, early stop, speed and training curves of subjects, as figures
layers      density per layer and mask overlap, as figures
published   the papers' values, and where each stands
provenance  a recipe as a difference from its preset; the command that makes a run again
draw        figures as SVG and PNG (matplotlib)
page        the page; markdown is its little sister
write       all of it into one folder
trend       benchmark records over time, as figures
live        a run in the terminal while it goes on
"""
