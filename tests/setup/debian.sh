# Sourced: fetches Debian bookworm packages with apt lists of our own, so that the machine's apt sources stay
# unchanged. On Debian the mirror is taken from the machine's own sources; elsewhere (on Ubuntu, say)
# SLACKWATER_DEBIAN_MIRROR names it. All packages are checked against the keys of the package
# debian-archive-keyring.

debian_keyring=/usr/share/keyrings/debian-archive-keyring.gpg

is_debian() { grep -qx 'ID=debian' /etc/os-release; }

# Prints each archive that apt is configured with, in both formats: its address and one of its suites.
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

# URIs: and Suites: in any order; an empty line ends a stanza.
mirrors_of_stanzas() {
  awk '
    function emit() { if (address != "" && suite != "") print address, suite; address = suite = "" }
    /^[ \t]*$/ { emit() }
    /^URIs:/ { address = $2 }
    /^Suites:/ { suite = $2 }
    END { emit() }'
}

# The mirrors of Debian's main archive and of its security archive. Without the latter its suites are left
# out.
debian_mirror() {
  if [ -n "${SLACKWATER_DEBIAN_MIRROR:-}" ]; then echo "$SLACKWATER_DEBIAN_MIRROR"; return; fi
  if is_debian; then
    # The main archive is the one with a plain suite (not -security) under one of Debian's own suite names.
    configured_mirrors | awk '$2 ~ /^(bookworm|trixie|forky|sid|stable|testing|unstable)(-updates)?$/ { print $1; exit }'
  fi
}

security_mirror() {
  if [ -n "${SLACKWATER_DEBIAN_SECURITY_MIRROR:-}" ]; then echo "$SLACKWATER_DEBIAN_SECURITY_MIRROR"; return; fi
  if is_debian; then configured_mirrors | awk '$2 ~ /-security/ { print $1; exit }'; fi
}

# private_apt FOLDER: prepares apt lists for bookworm in FOLDER and sets the array `bookworm` to the options
# that use them.
private_apt() {
  local folder=$1 main security suite
  main=$(debian_mirror)
  security=$(security_mirror)
  [ -n "$main" ] || die "this machine's apt sources name no Debian mirror: set SLACKWATER_DEBIAN_MIRROR"
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
  # As root, apt downloads as its own user, which may not be able to read the cache folder.
  [ "$(id -u)" -ne 0 ] || bookworm+=(-o APT::Sandbox::User=root)
}
