"""What every room may use: errors, atomic files, locks, text of numbers."""
