// Unpack the Chromium that npm's @sparticuz/chromium carries, its libraries and its fonts:
//
//     node unpack_chromium.mjs TARGET
//
// TARGET/chromium.sh starts it. Nothing is fetched from elsewhere; only x86-64 has a build.
import { execFileSync } from "node:child_process";
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { brotliDecompressSync } from "node:zlib";

const START = `#!/bin/sh
here=$(cd "$(dirname "$0")" && pwd)
export LD_LIBRARY_PATH="$here/lib" FONTCONFIG_FILE="$here/fonts.conf"
exec "$here/chromium" "$@"
`;
// The fonts that came along and no others: a page looks the same on every machine.
const fonts = (target) => `<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir prefix="relative">fonts</dir>
  <cachedir>${join(target, "font-cache")}</cachedir>
</fontconfig>
`;

const target = process.argv[2];
const entry = createRequire(import.meta.url).resolve("@sparticuz/chromium");
const packed = join(dirname(entry), "..", "..", "bin");

mkdirSync(target, { recursive: true });
for (const name of readdirSync(packed)) {
  const data = brotliDecompressSync(readFileSync(join(packed, name)));
  if (name.endsWith(".tar.br")) execFileSync("tar", ["-x", "-C", target], { input: data });
  else writeFileSync(join(target, name.replace(/\.br$/, "")), data, { mode: 0o755 });
}
writeFileSync(join(target, "fonts.conf"), fonts(resolve(target)));
writeFileSync(join(target, "chromium.sh"), START, { mode: 0o755 });
