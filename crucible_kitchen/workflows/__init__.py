"""The shipped workflows: one tree per file, each short enough to be read as a picture."""
