// Noise as JAX draws it (threefry keys, float32 normal numbers), so that a seed means the same pictures everywhere.

const rotl = (x, r) => (x << r) | (x >>> (32 - r));
const ROTATIONS = [[13, 15, 26, 6], [17, 29, 16, 24]];

// Threefry-2x32 of a key [k0, k1] and a counter [x0, x1].
export function threefry([k0, k1], [x0, x1]) {
  const keys = [k0, k1, k0 ^ k1 ^ 0x1bd11bda];
  x0 = (x0 + k0) | 0;
  x1 = (x1 + k1) | 0;
  for (let round = 0; round < 5; round++) {
    for (const r of ROTATIONS[round % 2]) {
      x0 = (x0 + x1) | 0;
      x1 = rotl(x1, r) ^ x0;
    }
    x0 = (x0 + keys[(round + 1) % 3]) | 0;
    x1 = (x1 + keys[(round + 2) % 3] + round + 1) | 0;
  }
  return [x0, x1];
}

const PRIOR = 1689520463;  // the domain '/prior' of runtime/randomness.py
const f = Math.fround;
const evaluate = (coefficients, w) => coefficients.reduce((sum, c) => f(f(sum * w) + f(c)));
const NEAR = [2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
  -0.00417768164, 0.246640727, 1.50140941].map(f);
const FAR = [-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613,
  0.00943887047, 1.00167406, 2.83297682].map(f);

// The inverse error function, by the polynomials of M. Giles that XLA uses, in float32.
function inverseError(x) {
  const w = f(-Math.log1p(-f(x * x)));
  return f(x * (w < 5 ? evaluate(NEAR, f(w - 2.5)) : evaluate(FAR, f(f(Math.sqrt(w)) - 3))));
}

const word = new Uint32Array(1), float = new Float32Array(word.buffer);
const LEAST = f(-1 + 2 ** -24);

// Float32Array of `size` normal numbers times `sigma`: image `index` of a seed.
export function noise(seed, index, size, sigma) {
  const key = threefry(threefry([0, seed | 0], [0, PRIOR]), [0, index]);
  return Float32Array.from({length: size}, (_, place) => {
    const [a, b] = threefry(key, [0, place]);
    word[0] = ((a ^ b) >>> 9) | 0x3f800000;
    const uniform = Math.max(LEAST, f(f(f(float[0] - 1) * f(1 - LEAST)) + LEAST));
    return f(sigma * f(f(Math.SQRT2) * inverseError(uniform)));
  });
}

// Noise between a and b, at 0 to 1 of their great circle; norms go evenly from one to the other.
export function slerp(a, b, t) {
  const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);
  const [normA, normB] = [Math.sqrt(dot(a, a)), Math.sqrt(dot(b, b))];
  const angle = Math.acos(Math.min(Math.max(dot(a, b) / Math.max(normA * normB, 1e-30), -1), 1));
  const sine = Math.sin(angle);
  if (sine < 1e-4) return a.map((value, i) => (1 - t) * value + t * b[i]);
  const norm = (1 - t) * normA + t * normB;
  const [ofA, ofB] = [Math.sin((1 - t) * angle) / sine / normA, Math.sin(t * angle) / sine / normB];
  return a.map((value, i) => norm * (ofA * value + ofB * b[i]));
}
