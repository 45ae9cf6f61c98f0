"""The papers' figures as declarations, and what makes them: ``fastlth reproduce`` (docs/reproduce.md).

declare      the words a figure is described in
frankle_carbin, zhou, linear_mode, morcos, renda    the figures, a file per paper
catalogue    all of them by name
scale        a declaration at paper, short or smoke scale, as jobs with recipes
work         the trainings of a job: which there are, which are done, making them
estimate     about how long those that are left take here, measured
"""
