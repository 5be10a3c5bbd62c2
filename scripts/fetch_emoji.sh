#!/bin/sh
# Fetches the npm packages emoji-datasource-google and emoji-datasource-twitter (136 MB; the drawings are Noto Color
# Emoji, Apache License 2.0, and Twemoji, CC BY 4.0) and unpacks the 64 x 64 drawings and their list to a folder:
#   scripts/fetch_emoji.sh runs/emoji
set -eu
to=${1:?usage: scripts/fetch_emoji.sh FOLDER}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for vendor in google twitter; do
    (cd "$work" && npm pack --silent "emoji-datasource-$vendor@16.0.0" > /dev/null && tar -xzf "emoji-datasource-$vendor-16.0.0.tgz")
    mkdir -p "$to/$vendor"
    cp "$work"/package/img/"$vendor"/64/*.png "$to/$vendor/"
    cp "$work/package/emoji.json" "$to/"
    rm -r "$work/package"
done
