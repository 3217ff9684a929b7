#!/usr/bin/env bash
# Bundle gsplat.js, the renderer of Gaussians in index.html, to one classic script: a page that is opened as a file may
# load no modules, not even as workers. Needs npm; the result is committed, so that pip install does not.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --silent --no-audit --no-fund --save-exact gsplat@1.2.9 esbuild@0.28.2
cat >bundle.mjs <<'END'
import { readFileSync, writeFileSync } from "node:fs";
import { buildSync, transformSync } from "esbuild";

const options = { format: "iife", minify: true, define: { "import.meta.url": "undefined" } };
const source = "node_modules/gsplat/dist/index.es.js";
let [workers, types] = [0, 0];
const classic = readFileSync(source, "utf8")
  .replace(/"([A-Za-z0-9+/=]{9999,})"/g, (found, encoded) => {
    const code = Buffer.from(encoded, "base64").toString();
    if (!code.includes("self.onmessage")) return found; // WebAssembly
    workers += 1;
    return JSON.stringify(Buffer.from(transformSync(code, options).code).toString("base64"));
  })
  .replaceAll("URL.revokeObjectURL(import.meta.url);", "") // that of the worker; the few bytes may stay
  .replaceAll('type: "module"', () => ((types += 1), 'type: "classic"'));
if (workers !== 2 || types !== 4) throw Error(`expected 2 workers, started in 4 places, got ${workers}, ${types}`);
writeFileSync(source, classic);

const { name, version, repository } = JSON.parse(readFileSync("node_modules/gsplat/package.json", "utf8"));
const banner = `/*! ${name} ${version}, ${repository.url}; bundled, with classic workers, by gafext
${readFileSync("node_modules/gsplat/LICENSE", "utf8")}
Built upon three.js, Copyright (c) 2010-2023 three.js authors; antimatter15/splat, Copyright (c) 2023 Kevin Kwok;
UnityGaussianSplatting, Copyright (c) 2023 Aras Pranckevičius: the same license. */`;
writeFileSync("entry.js", `export { Camera, Color32, Matrix3, PLYLoader, Quaternion, Scene, Vector3, WebGLRenderer }
  from "gsplat";`);
buildSync({
  ...options,
  entryPoints: ["entry.js"],
  bundle: true,
  globalName: "gsplat",
  banner: { js: banner },
  outfile: process.argv[2],
});
END
node bundle.mjs "$here/gsplat.min.js"
