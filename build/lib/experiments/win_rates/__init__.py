"""Win rates against reference responses: tasks, policies and measurements."""
