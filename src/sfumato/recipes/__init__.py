"""Recipes: configurations that work as they are. The first line of each says what it makes."""
