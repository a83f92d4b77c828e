"""Tasks made offline from a seed, at any length: JSON key/value and RULER's thirteen."""
