# Cargo's own tools that the Makefile calls, built from source where the machine has none.

declare -A cargo_tool_takes=([cargo-nextest]="about 5 minutes" [cargo-deny]="about 10 minutes")

install_cargo_tool() {
  local tool=$1 folder=$cache/cargo-tools
  if command -v "$tool" >/dev/null; then
    say "$tool: there"
    return
  fi
  mkdir -p "$folder"
  # A target folder of its own: the workspace's would be locked for as long as this takes.
  step "$folder/$tool.log" "$tool: building, ${cargo_tool_takes[$tool]}, once" \
    env CARGO_TARGET_DIR="$folder/target" cargo install --locked "$tool"
}
