# Sourced by launch/quickstart and tests/run: leaves a Python environment with this project in it, and its path in
# $ENVIRONMENT. The first call takes a minute or two; later ones notice that nothing changed and return at once.
#
#   AUTOGLM_VENV   where the environment is, or is to be made (default: .venv in the repository)
#   AUTOGLM_TORCH  the version of torch to install where there is none (default below)

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TORCH_VERSION="${AUTOGLM_TORCH:-2.13.0}"

say() { printf 'setup: %s\n' "$*" >&2; }

fail() {
    say "$1; do: $2"
    exit 1
}

# The first interpreter that is new enough, or nothing. Names on PATH may be stubs, so each one is asked.
find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
}

has_torch() { "$1" -c 'import torch; v = torch.__version__.split("."); exit((int(v[0]), int(v[1])) < (2, 10))' 2>/dev/null; }

has_cuda() { [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; }

# pip, quiet: what it says goes to a log, and a failure is one line. Arguments: what is installed (for people), pip's.
pip_install() {
    local what="$1" log="$ENVIRONMENT/setup.log" reason
    shift
    say "installing $what"
    if ! "$ENVIRONMENT/bin/python" -m pip install --no-input --disable-pip-version-check "$@" >"$log" 2>&1; then
        reason="$(grep -m1 -E '^ERROR:|No space left' "$log" || tail -n1 "$log")"
        fail "pip could not install $what (${reason#ERROR: })" "check the network and the disk, then run this again; all of it is in $log"
    fi
}

# An environment that is active and has torch is used as it is: nothing is downloaded twice. Else one is made.
choose_environment() {
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    if [ -n "${AUTOGLM_VENV:-}" ]; then
        ENVIRONMENT="$AUTOGLM_VENV"
    elif [ -n "$active" ] && has_torch "$active/bin/python"; then
        ENVIRONMENT="$active"
    else
        ENVIRONMENT="$REPOSITORY/.venv"
    fi
    [ -x "$ENVIRONMENT/bin/python" ] && "$ENVIRONMENT/bin/python" -c 'import pip' 2>/dev/null && return
    make_environment
}

make_environment() {
    local python options=()
    if compgen -G "$ENVIRONMENT/*" >/dev/null && [ ! -e "$ENVIRONMENT/pyvenv.cfg" ]; then
        fail "$ENVIRONMENT is not a Python environment" "name a new folder in AUTOGLM_VENV"
    fi
    python="$(find_python)"
    [ -n "$python" ] || fail "no Python 3.11 or newer on PATH" "install one (Debian, Ubuntu: apt-get install python3 python3-venv)"
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        install_venv_module "$python"
    fi
    if has_torch "$python"; then
        options=(--system-site-packages)
        say "keeping the torch of $python"
    fi
    say "making $ENVIRONMENT with $("$python" --version)"
    "$python" -m venv --clear ${options[@]+"${options[@]}"} "$ENVIRONMENT" >/dev/null ||
        fail "could not make $ENVIRONMENT" "check that the folder can be written, or name another in AUTOGLM_VENV"
}

# Debian splits venv off Python; in a container we are root and may simply add it.
install_venv_module() {
    local package
    package="python$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing $package with apt-get"
        { apt-get update && apt-get install -y --no-install-recommends "$package"; } >/dev/null 2>&1 && return
    fi
    fail "$1 lacks the module venv" "apt-get install $package"
}

install_torch() {
    local python="$ENVIRONMENT/bin/python"
    has_torch "$python" && return
    if has_cuda || [ "$(uname -s)" != Linux ]; then
        pip_install "torch $TORCH_VERSION" "torch==$TORCH_VERSION"
    elif "$python" -m pip index versions torch 2>/dev/null | grep -qF "$TORCH_VERSION+cpu"; then
        pip_install "torch $TORCH_VERSION for CPUs" "torch==$TORCH_VERSION+cpu"
    else
        pip_install "torch $TORCH_VERSION for CPUs" "torch==$TORCH_VERSION+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
    fi
}

# setup EXTRA: the project, editable, with the extra requirements of that name.
setup() {
    local extra="$1" stamp want
    choose_environment
    want="$REPOSITORY $(git hash-object --no-filters "$REPOSITORY/pyproject.toml") $extra"
    stamp="$ENVIRONMENT/.autoglm-$extra"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        install_torch
        pip_install "the project and its requirements" --editable "$REPOSITORY[$extra]"
        printf '%s\n' "$want" >"$stamp"
        say "ready: $ENVIRONMENT"
    fi
    export PATH="$ENVIRONMENT/bin:$PATH"
}
