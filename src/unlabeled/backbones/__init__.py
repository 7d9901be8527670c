"""Backbones: modules with `.dim` and, where the architecture has them, `.stages(x)`."""
