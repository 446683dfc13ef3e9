# To be sourced by bash. stage LABEL LOG COMMAND... runs the command (or function) with its output in LOG and shows one
# line: the label, how far it is, and the seconds it took. A failure shows the end of LOG and is passed on.
# An interrupt ends the command with all its children: set -m gives it a process group of its own.

stage() {
  local label=$1 log=$2 start=${EPOCHREALTIME/[.,]/} status=0 step
  shift 2
  mkdir -p "$(dirname "$log")"
  set -m
  "$@" >"$log" 2>&1 </dev/null &
  local pid=$!
  set +m
  # shellcheck disable=SC2064  # this stage's process, not a later one's
  trap "kill -TERM -- -$pid 2>/dev/null; echo; exit 130" INT TERM HUP

  if [ -t 1 ]; then
    while kill -0 "$pid" 2>/dev/null; do
      step=$(grep -oE '\[[0-9]+/[0-9]+\]' "$log" | tail -n 1 || true)
      printf '\r\033[K%s ... %s %s' "$label" "$step" "$(seconds_since "$start")"
      sleep 0.2
    done
    printf '\r\033[K'
  fi
  printf '%s ... ' "$label"
  wait "$pid" || status=$?
  trap - INT TERM HUP
  if [ "$status" -ne 0 ]; then
    printf 'failed after %s. The end of %s:\n' "$(seconds_since "$start")" "$log"
    tail -n 40 "$log" >&2
    return "$status"
  fi
  printf 'done in %s\n' "$(seconds_since "$start")"
}

# Prints the time since $1 (microseconds of EPOCHREALTIME), as in «12.3 s».
seconds_since() {
  local passed=$((${EPOCHREALTIME/[.,]/} - $1))
  printf '%d.%d s' $((passed / 1000000)) $((passed / 100000 % 10))
}
