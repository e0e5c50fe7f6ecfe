# Sourced: Debian bookworm's packages by way of lists of our own, so that the machine's apt sources stay as they are. The
# mirror is the one that this machine's own sources name; elsewhere (Ubuntu, say) SLACKWATER_DEBIAN_MIRROR names it, and the
# package debian-archive-keyring has the keys that everything is checked against.

debian_keyring=/usr/share/keyrings/debian-archive-keyring.gpg

is_debian() { grep -qx 'ID=debian' /etc/os-release; }

# Every archive that apt is configured with, in both formats: its address, and one of its suites.
configured_mirrors() {
  local file
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    [ ! -f "$file" ] || mirrors_of_lines <"$file"
  done
  for file in /etc/apt/sources.list.d/*.sources; do
    [ ! -f "$file" ] || mirrors_of_stanzas <"$file"
  done
}

# deb [OPTIONS] ADDRESS SUITE COMPONENT...
mirrors_of_lines() {
  sed -n 's/^deb[[:space:]]\{1,\}\(\[[^]]*\][[:space:]]*\)\{0,1\}//p' | awk '{ print $1, $2 }'
}

# URIs: and Suites: in any order, stanzas apart by an empty line.
mirrors_of_stanzas() {
  awk '
    function told() { if (address != "" && suite != "") print address, suite; address = suite = "" }
    /^[ \t]*$/ { told() }
    /^URIs:/ { address = $2 }
    /^Suites:/ { suite = $2 }
    END { told() }'
}

# The mirror of Debian's main archive, and of its security archive, whose suites are left out where there is none.
debian_mirror() {
  if [ -n "${SLACKWATER_DEBIAN_MIRROR:-}" ]; then echo "$SLACKWATER_DEBIAN_MIRROR"; return; fi
  if is_debian; then
    # The main archive is the one that a plain suite (no -security) comes from, with Debian's own suite names.
    configured_mirrors | awk '$2 ~ /^(bookworm|trixie|forky|sid|stable|testing|unstable)(-updates)?$/ { print $1; exit }'
  fi
}

security_mirror() {
  if [ -n "${SLACKWATER_DEBIAN_SECURITY_MIRROR:-}" ]; then echo "$SLACKWATER_DEBIAN_SECURITY_MIRROR"; return; fi
  if is_debian; then configured_mirrors | awk '$2 ~ /-security/ { print $1; exit }'; fi
}

# private_apt FOLDER: prepares apt lists of bookworm in FOLDER and sets the array `bookworm` to the options that use them.
private_apt() {
  local folder=$1 main security suite
  main=$(debian_mirror)
  security=$(security_mirror)
  [ -n "$main" ] || die "no Debian mirror among this machine's apt sources: set SLACKWATER_DEBIAN_MIRROR to one"
  [ -r "$debian_keyring" ] || die "$debian_keyring is missing: install debian-archive-keyring"
  mkdir -p "$folder"/{lists/partial,cache/archives/partial}
  {
    for suite in bookworm bookworm-updates bookworm-backports; do
      echo "deb [signed-by=$debian_keyring] $main $suite main"
    done
    echo "deb-src [signed-by=$debian_keyring] $main bookworm main"
    [ -z "$security" ] || echo "deb [signed-by=$debian_keyring] $security bookworm-security main"
  } >"$folder/sources.list"
  bookworm=(-o "Dir::Etc::SourceList=$folder/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::State::Lists=$folder/lists" -o "Dir::Cache=$folder/cache"
    -o Acquire::Retries=3 -qq)
  # Only root may drop privileges for downloads, and the cache may lie where apt's own user cannot read.
  [ "$(id -u)" -ne 0 ] || bookworm+=(-o APT::Sandbox::User=root)
}
