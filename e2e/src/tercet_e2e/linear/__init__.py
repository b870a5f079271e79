"""Real processes under faults, and a judge of what their hosts were told (`run` begins)."""
