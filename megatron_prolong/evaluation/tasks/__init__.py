"""HELMET's seven categories and RULER's thirteen tasks, one file each."""
