"""The primitives: one file each, with all of its rules in a fixed order."""
