"""What all commands share: types of options, progress, text for a terminal, charts."""
