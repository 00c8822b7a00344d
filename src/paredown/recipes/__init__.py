"""Recipes that ship with paredown (*.yaml) and their tasks (*.py): digits is the embedded default."""
