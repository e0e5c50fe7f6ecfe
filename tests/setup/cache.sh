# Sourced by the other scripts here: where built things are kept, and how they are built once and never half.
#
# A thing lives in $cache/<what>-<key>/, where <key> is the digest of the script that makes it: a changed script makes a new
# folder, and two checkouts of different ages do not disturb each other. It is built in <folder>.partial, which a second try
# finds as the first left it, and renamed when it is whole. A lock keeps two runs apart.

setup=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/slackwater

say() { printf '[%4d s] %s\n' "$SECONDS" "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

# folder_of WHAT: where WHAT, made by WHAT.sh, is or will be.
folder_of() {
  local key
  key=$(sha256sum <"$setup/$1.sh" | cut -c1-12)
  echo "$cache/$1-$key"
}

# build_once FOLDER FUNCTION: makes FOLDER, if it is not there yet, by calling FUNCTION with the folder to fill.
build_once() {
  local folder=$1 make=$2
  [ ! -e "$folder/.finished" ] || return 0
  mkdir -p "$cache"
  (
    flock --nonblock 9 || {
      say "another run is making $(basename "$folder"): waiting for it"
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

# step LOG TEXT COMMAND...: runs COMMAND with its output in LOG, says TEXT before, and every half minute how long it has been.
# When it fails, the end of LOG is shown.
step() {
  local log=$1 text=$2 begin=$SECONDS status=0 beat
  shift 2
  say "$text"
  (
    while sleep 30 >/dev/null 2>&1; do say "  ... still at it, $((SECONDS - begin)) s: $text"; done
  ) 9>&- &
  beat=$!
  # A subshell of its own, without `||`: inside the left side of `||` a function would go on after an error.
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
    die "failed with status $status: $text (whole log: $log)"
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
