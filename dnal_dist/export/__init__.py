"""From a finished run to files that load without this project, each proven equal; and what they are worth."""
