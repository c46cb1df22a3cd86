"""Watching a service: its history as a table, a picture, a live view in the terminal and a web page."""
