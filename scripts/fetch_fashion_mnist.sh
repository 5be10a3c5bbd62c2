#!/bin/sh
# Fetches Debian's package dataset-fashion-mnist (Fashion-MNIST, MIT license, 31 MB) and unpacks its four files to a
# folder, without root:
#   scripts/fetch_fashion_mnist.sh runs/fashion_mnist
set -eu
to=${1:?usage: scripts/fetch_fashion_mnist.sh FOLDER}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$work" && apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb unpacked)
mkdir -p "$to"
cp "$work"/unpacked/usr/share/datasets/fashion-mnist/*.gz "$to/"
