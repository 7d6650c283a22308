# Sourced by agents and ssh: several agents in the background, whose end is the end of this command.
#
# The first Ctrl-C (or TERM) asks the job to commit a snapshot and leave, the second one to stop at once. What the agents
# are told, and how, is in tell(), which whoever sources this may replace.

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

agents=()

tell() { kill -TERM "${agents[@]}" 2>/dev/null; }

stop() {
    say "asking the agents to leave; once more to stop at once"
    tell
}

# A port that nobody listens on now.
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

# Waits for all agents and ends with the job's exit code: who says "do not restart" or "done" speaks for the job, and
# "start me again" comes before the failure of a single node.
finish() {
    local agent code codes=() word
    for agent in "${agents[@]}"; do
        while kill -0 "$agent" 2>/dev/null; do wait "$agent"; done
        wait "$agent"
        code=$?
        codes+=("$code")
    done
    for word in 93 0 75; do
        if [[ " ${codes[*]} " == *" $word "* ]]; then exit "$word"; fi
    done
    exit "${codes[0]}"
}
