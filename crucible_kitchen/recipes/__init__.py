"""The shipped recipes: a workflow with vetted defaults."""
