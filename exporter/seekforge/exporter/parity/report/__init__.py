"""A comparison as text, JSON and a page."""
