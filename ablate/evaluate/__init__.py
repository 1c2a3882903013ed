"""What the loss does not show: recall, benchmarks, length, on any checkpoint.

Nothing here is imported before it is asked for: the tasks in `tasks/` are read by lm-eval alone.
"""
