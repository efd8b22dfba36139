"""What every part stands on: errors, files, text for a terminal. It knows nothing of models, operators or engines."""
