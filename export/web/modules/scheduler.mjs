/**
 * Euler's steps, with ancestral noise or without, from constants that Python wrote.
 *
 * Every operation is rounded to FP32, in diffusers' order: the same noise and the same predictions
 * give the same latents.
 */

import { Failure } from "./errors.mjs";

const f = Math.fround;

/** The constants of a step count: `first`, and `steps`; a count that has none is refused. */
export function scheduleOf(scheduler, count) {
  const schedule = scheduler.counts[count];
  if (schedule) return schedule;
  const counts = Object.keys(scheduler.counts).join(", ");
  throw new Failure(`${count} steps are not in this folder`, `it was written for ${counts}`,
    "take one of these");
}

/** Standard noise, at the scale at which the first step starts. */
export function firstSample(noise, schedule) {
  const first = f(schedule.first);
  return noise.map((value) => f(value * first));
}

/** Latents of a picture with noise, as they are at the step that runs first. */
export function noisedLatents(latents, noise, step) {
  const sigma = f(step.sigma);
  return latents.map((value, i) => f(value + f(noise[i] * sigma)));
}

/** How many of `count` steps run at a strength, the last ones; none is refused. */
export function keptSteps(count, strength) {
  const kept = Math.min(Math.trunc(count * strength + 1e-6), count);
  if (kept >= 1 && strength <= 1) return kept;
  throw new Failure(`${count} steps at strength ${strength} leave no step to run`,
    `${count} x ${strength} is not from 1 to ${count}`,
    `take a strength from ${(1 / count).toFixed(2)} to 1`);
}

/** What the UNet is given of a sample. */
export function modelInput(sample, step) {
  const scale = f(step.input_scale);
  return sample.map((value) => f(value / scale));
}

/** The next sample. `noise` is read where the step adds any, and may be null where it adds none. */
export function nextSample(sample, output, noise, step, prediction) {
  const sigma = f(step.sigma);
  const change = f(f(step.sigma_down) - sigma);
  const up = f(step.sigma_up);
  const scale = f(step.input_scale);
  const square = f(f(sigma * sigma) + 1);
  const slope = f(-sigma / scale);
  const velocity = prediction === "v_prediction";
  return sample.map((value, i) => {
    const clean = velocity
      ? f(f(output[i] * slope) + f(value / square))
      : f(value - f(sigma * output[i]));
    const moved = f(value + f(f(f(value - clean) / sigma) * change));
    return up ? f(moved + f(noise[i] * up)) : moved;
  });
}
