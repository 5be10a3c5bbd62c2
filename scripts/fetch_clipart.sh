#!/bin/sh
# Fetches Debian's package openclipart-png (public domain, 131 MB) and unpacks its pictures to a folder, without root:
#   scripts/fetch_clipart.sh runs/openclipart
set -eu
to=${1:?usage: scripts/fetch_clipart.sh FOLDER}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$work" && apt-get download openclipart-png && dpkg -x openclipart-png_*.deb unpacked)
mkdir -p "$to"
cp -r "$work/unpacked/usr/share/openclipart/png/." "$to/"
