"""What happened, as data and for people: the event log, the metrics, and what is derived from the two.

May touch: the run directory's `events.jsonl` and `metrics.jsonl`, a terminal, a picture file. Must never:
change a run, raise into training, or need torch.
"""
