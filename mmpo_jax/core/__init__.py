"""What everything else stands on: files, stages, sections of recipes, errors, progress."""
