#!/usr/bin/env bash
# Bundle gsplat.js, the renderer of Gaussians in index.html, to one classic script: a page opened as a file may load no
# modules. Needs npm; the result is committed, so that pip install does not.
set -euo pipefail
gsplat=gsplat@1.2.9 esbuild=esbuild@0.28.2
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --silent --no-audit --no-fund --save-exact "$gsplat" "$esbuild"
echo 'export { Camera, Color32, Matrix3, PLYLoader, Quaternion, Scene, Vector3, WebGLRenderer } from "gsplat";' >entry.js
banner="/*! $gsplat, https://github.com/dylanebert/gsplat.js
$(cat node_modules/gsplat/LICENSE)
Built upon three.js, Copyright (c) 2010-2023 three.js authors; antimatter15/splat, Copyright (c) 2023 Kevin Kwok;
UnityGaussianSplatting, Copyright (c) 2023 Aras Pranckevičius: the same license. */"
npx esbuild entry.js --bundle --minify --format=iife --global-name=gsplat --define:import.meta.url=undefined \
  --banner:js="$banner" --log-level=warning --outfile="$here/gsplat.min.js"
