# Sourced by the other scripts here: where build results are kept, and how they are built exactly once.
#
# Each component is in $cache/<what>-<key>/, where <key> is the digest of the script that makes it: a changed
# script makes a new folder, and checkouts of different ages do not disturb each other. A component is built
# in <folder>.partial, where a second try continues, and the folder is renamed when it is complete. A lock
# keeps concurrent runs apart.

setup=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/slackwater

say() { printf '[%4d s] %s\n' "$SECONDS" "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

# folder_of WHAT: the folder in which WHAT.sh puts WHAT.
folder_of() {
  local key
  key=$(sha256sum <"$setup/$1.sh" | cut -c1-12)
  echo "$cache/$1-$key"
}

# build_once FOLDER FUNCTION: makes FOLDER, unless it exists, by calling FUNCTION with the folder to fill.
build_once() {
  local folder=$1 make=$2
  [ ! -e "$folder/.finished" ] || return 0
  mkdir -p "$cache"
  (
    flock --nonblock 9 || {
      say "another run is building $(basename "$folder"): waiting for it"
      flock 9
    }
    [ ! -e "$folder/.finished" ] || exit 0
    mkdir -p "$folder.partial/log"
    "$make" "$folder.partial"
    touch "$folder.partial/.finished"
    rm -rf "$folder"
    mv "$folder.partial" "$folder"
  ) 9>"$folder.lock"
}

# step LOG TEXT COMMAND...: prints TEXT, runs COMMAND with its output in LOG, and prints the elapsed time
# every half minute. If COMMAND fails, prints the end of LOG.
step() {
  local log=$1 text=$2 begin=$SECONDS status=0 beat
  shift 2
  say "$text"
  (
    while sleep 30 >/dev/null 2>&1; do say "  ... still running, $((SECONDS - begin)) s: $text"; done
  ) 9>&- &
  beat=$!
  # In a subshell, without `||`: on the left side of `||` a function would continue after an error.
  set +e
  (
    set -e
    "$@"
  ) >"$log" 2>&1 </dev/null
  status=$?
  set -e
  kill "$beat" 2>/dev/null || true
  wait "$beat" 2>/dev/null || true
  [ "$status" -eq 0 ] || {
    tail -n 30 "$log" >&2
    die "failed with status $status: $text (full log: $log)"
  }
}

# as_root COMMAND...
as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "this needs root: $*"
  fi
}
