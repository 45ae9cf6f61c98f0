"""Named recipes per (model, data set), one TOML file per preset, read by ``fastlth/composition.py``."""
