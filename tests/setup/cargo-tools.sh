# Rust programs that the Makefile calls. They are built from source unless the machine has them.

declare -A cargo_tool_takes=(
  [cargo-nextest]="about 5 minutes"
  [cargo-deny]="about 10 minutes"
  [typos-cli]="about 10 minutes"
)

# install_cargo_tool CRATE [PROGRAM]: PROGRAM is what CRATE installs, by default under its own name.
install_cargo_tool() {
  local tool=$1 program=${2:-$1} folder=$cache/cargo-tools
  if command -v "$program" >/dev/null; then
    say "$program: already installed"
    return
  fi
  mkdir -p "$folder"
  # A separate target folder: in the workspace's, the build would hold Cargo's lock all that time.
  step "$folder/$tool.log" "$tool: building, ${cargo_tool_takes[$tool]}, once" \
    env CARGO_TARGET_DIR="$folder/target" cargo install --locked "$tool"
}
