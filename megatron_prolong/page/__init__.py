"""One-file HTML pages with inline SVG charts: no script, no external file, readable in print and in the dark."""
