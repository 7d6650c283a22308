"""What runs inside a worker: `elastic.run`, `Job`, and what they need.

May touch: this process, its process groups, the control channel to its agent. Must never: start or end other
processes, write shared state other than through `snapshot`.
"""
