"""Reads run folders only, without torch: page, markdown, figures, comparison, run list."""
