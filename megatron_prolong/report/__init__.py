"""Reads run directories: what a run has done so far, and a page about it. Needs files only, no torch."""
