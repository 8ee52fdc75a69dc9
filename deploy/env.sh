# shellcheck shell=bash
# What every command on a node of a cluster needs; read by ~/.bashrc and by the commands that start Ray.
export PATH="$HOME/bert-encoding/.venv/bin:$PATH"
export RAY_AUTH_MODE=token                    # with ~/.ray/auth_token; without it a node cannot join one that has it
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0   # a trial without a GPU leaves the GPUs of others visible, as Ray will
export RAY_USAGE_STATS_ENABLED=0
unset OMP_NUM_THREADS                         # `ray up` sets 1, which would hold for every trial
# Ray opens its own folder, with the sockets, to everybody: so the one around it is ours alone, or Ray does not start.
RAY_TMPDIR="/tmp/bert-encoding-$(id -un)"
if ! mkdir -m 700 "$RAY_TMPDIR" 2>/dev/null; then
    if [ ! -d "$RAY_TMPDIR" ] || [ -L "$RAY_TMPDIR" ] || [ ! -O "$RAY_TMPDIR" ] || ! chmod 700 "$RAY_TMPDIR"; then
        echo "$RAY_TMPDIR: belongs to somebody else; Ray cannot start" >&2
        RAY_TMPDIR=/nonexistent
    fi
fi
export RAY_TMPDIR
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"   # Ray opens many files
