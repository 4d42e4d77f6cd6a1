#!/bin/sh
# Installs Debian's Chromium and a font for the tests in a browser, if one is missing.
set -eu
missing=""
command -v chromium > /dev/null || missing="chromium"
fc-list 2> /dev/null | grep -q DejaVu || missing="$missing fonts-dejavu-core fontconfig"
if [ -n "$missing" ]; then
    apt-get update -q
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
fi
