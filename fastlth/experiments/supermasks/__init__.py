"""Supermasks: masks that make a net good without training any of its weights.

``plan`` what is asked for · ``one_shot`` masks read off a trained net · ``net`` a net whose scores are trained, with
masks from ``learned`` (Bernoulli) or ``edge_popup`` (the highest scores) · ``run`` one experiment, with its files.
"""
