"""The protocols and policies, as pure state machines: no I/O, no clock, no randomness, no torch.

Everything here is `step(state, event) -> (state, effects)` over frozen data. Time comes in as a number, the
world as events; what is to be done goes out as effects, which the caller carries out, in order, and answers
with further events. So the agent, the trainer and the simulator run the very same code, and one input always
gives one output.

Theory of operation
-------------------

**Who is in** (`membership`, `generation`, `budget`, `failure`). One agent leads. It hears who is alive and
what broke, and seals generations: numbered, immutable memberships. Numbers only grow, and whatever changes
shared state carries one; what is stale is ignored. A broken generation is replaced at once if enough nodes
are left; a growing one is left at an agreed boundary. Failures without progress exhaust the restart budget,
and the first of them is named.

**What was committed** (`commit`, `outcome`). A snapshot is cut at one step boundary by all ranks of one
generation. Each makes its packs durable and votes; rank 0 has all votes, makes the manifest durable, and then
puts the catalog entry if absent: that one move is the commit. No entry, no snapshot. An effect whose outcome
is unknown is settled by reading.

**What counts** (`lineage`). Before its first step a generation records what it extends: a parent generation
at a step. Walking back from the newest record, an entry of generation g counts only up to the step at which g
was left. That is the fence: a coordinator which was paused for an hour may still put its entry, and nobody
will ever resume from it.

**Where to resume** (`recovery`). Who holds what at which step, the catalog and the records go in, a plan
comes out, with its reason: a live replica at the newest step of the lineage, else live shards that all stand
at one step, else the newest snapshot. Steps and generations are never mixed. The order of a recovery is:
plan, record (`Plan.record`, put if absent), move state, first step; so no state of a generation exists before
its record does.

**Which samples** (`split`). The global batch and the order of samples are functions of a cursor, not of the
world, and the cursor is part of the state. So every sample is taken exactly once along the lineage.

**What people see** (`lifecycle`). One table of legal transitions for jobs, nodes and ranks.

The invariants (I1 … I11) of docs/design.md are what these machines uphold together; `autoglm_elastic.sim`
checks them.
"""
