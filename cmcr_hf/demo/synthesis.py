"""Synthesise sounds of the concepts: two seconds at 16 kHz, procedural, different at every call."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .concepts import named_concept

SAMPLING_RATE = 16_000
DURATION_S = 2.0
_SAMPLES = int(SAMPLING_RATE * DURATION_S)
_TIME = np.arange(_SAMPLES) / SAMPLING_RATE
_FREQUENCIES = np.fft.rfftfreq(_SAMPLES, 1 / SAMPLING_RATE)

Wave = np.ndarray
_Random = np.random.Generator


def synthesise(concept: str, generator: np.random.Generator) -> np.ndarray:
    """Synthesise one sound of a concept.

    Pitch, tempo, timbre, onset, level and background noise are random.

    Returns mono float32 samples at 16 kHz, 32000 of them, with a peak between 0.15 and 0.95.
    """
    named_concept(concept)
    wave = _SOUNDS[concept](generator)
    wave = wave / np.sqrt(np.mean(wave**2))
    # Background colour: 0 is white noise, 1 is pink.
    background = _shaped_noise(generator, np.maximum(_FREQUENCIES, 20.0) ** (-0.5 * generator.uniform(0, 1)))
    wave += background * 10 ** (-generator.uniform(6, 32) / 20)
    wave *= generator.uniform(0.15, 0.95) / np.abs(wave).max()
    return wave.astype(np.float32)


def _shaped_noise(random: _Random, gain: np.ndarray) -> Wave:
    """Return Gaussian noise of unit power whose spectrum has this gain."""
    phases = random.standard_normal((2, _FREQUENCIES.size))
    wave = np.fft.irfft((phases[0] + 1j * phases[1]) * gain, _SAMPLES)
    return np.asarray(wave / np.sqrt(np.mean(wave**2)))


def _band_noise(random: _Random, low: float, high: float) -> Wave:
    """Return noise of unit power between two frequencies in Hz, with soft edges."""
    return _shaped_noise(random, 1 / (1 + (low / np.maximum(_FREQUENCIES, 1)) ** 4) / (1 + (_FREQUENCIES / high) ** 6))


def _tone(frequency: np.ndarray | float, phase: float = 0.0) -> Wave:
    """Return a sine of this frequency in Hz, constant or one for each sample."""
    if isinstance(frequency, np.ndarray):
        return np.sin(2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE + phase)
    return np.sin(2 * np.pi * frequency * _TIME + phase)


def _impulses(random: _Random, rate: float, spread: float) -> Wave:
    """Return clicks at random times, `rate` a second, whose log-normal heights spread by `spread`."""
    wave = np.zeros(_SAMPLES)
    places = random.integers(0, _SAMPLES, max(1, random.poisson(rate * DURATION_S)))
    wave[places] = random.lognormal(0.0, spread, places.size) * random.choice([-1.0, 1.0], places.size)
    return wave


def _filtered(wave: Wave, kernel: np.ndarray) -> Wave:
    size = 2 * _SAMPLES
    return np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(kernel, size), size)[:_SAMPLES]


def _add(wave: Wave, event: np.ndarray, start_s: float) -> None:
    """Add an event in place from `start_s` on, cut at the end of the wave."""
    start = int(start_s * SAMPLING_RATE)
    stop = min(_SAMPLES, start + event.size)
    if start < stop:
        wave[start:stop] += event[: stop - start]


def _times(length_s: float) -> np.ndarray:
    return np.arange(int(length_s * SAMPLING_RATE)) / SAMPLING_RATE


def _bump(length_s: float, sharpness: float = 1.0) -> np.ndarray:
    """Return an envelope that rises from 0 to 1 and falls back to 0."""
    return np.sin(np.pi * _times(length_s) / length_s) ** sharpness


def _wander(random: _Random, points: int) -> Wave:
    """Return a slow random curve of mean about 0 and deviation about 1."""
    return np.interp(_TIME, np.linspace(0, DURATION_S, points), random.standard_normal(points))


def _onsets(random: _Random, rate: float, jitter: float) -> np.ndarray:
    """Return onset times in seconds at about `rate` a second, moved by `jitter` of a period."""
    times = np.arange(random.uniform(0, 1 / rate), DURATION_S, 1 / rate)
    return np.clip(times + random.normal(0, jitter / rate, times.size), 0, DURATION_S)


def _bee(random: _Random) -> Wave:
    pitch = random.uniform(140, 260) * (1 + 0.04 * _wander(random, 8) + 0.01 * _tone(random.uniform(4, 9)))
    cycle = np.cumsum(pitch) / SAMPLING_RATE
    buzz = 2 * (cycle % 1) - 1 + random.uniform(0.2, 0.6) * np.sign(np.sin(2 * np.pi * cycle))
    return _filtered(buzz, np.hanning(int(random.integers(4, 9)))) * (1 + 0.35 * np.tanh(_wander(random, 6)))


def _bell(random: _Random) -> Wave:
    ratios = np.array([0.5, 1.0, 1.2, 1.5, 2.0, 2.67, 3.01, 4.1]) * random.normal(1, 0.004, 8)
    heights = np.array([0.5, 1.0, 0.8, 0.4, 0.7, 0.4, 0.3, 0.2]) * random.uniform(0.5, 1.5, 8)
    pitch, decay = random.uniform(330, 950), random.uniform(0.35, 1.1)
    wave = np.zeros(_SAMPLES)
    strike = np.zeros(_SAMPLES)
    for ratio, height in zip(ratios, heights, strict=True):
        strike += height * _tone(pitch * ratio, random.uniform(0, 6)) * np.exp(-_TIME / decay * ratio**0.6)
    for onset in _onsets(random, random.uniform(0.7, 2.6), 0.03):
        _add(wave, strike * random.uniform(0.7, 1.0), onset)
    return wave


def _bird(random: _Random) -> Wave:
    wave = np.zeros(_SAMPLES)
    home, rate = random.uniform(2200, 4800), random.uniform(3, 9)
    sweep, warble = random.uniform(-0.35, 0.35), random.uniform(0.0, 0.12)
    for onset in _onsets(random, rate, 0.1):
        length = random.uniform(0.3, 0.85) / rate
        time = _times(length)
        centre = home * random.normal(1, 0.08)
        pitch = centre * (1 + sweep * (time / length - 0.5) + warble * np.sin(2 * np.pi * 28 * time))
        _add(wave, np.sin(2 * np.pi * np.cumsum(pitch) / SAMPLING_RATE) * _bump(length), onset)
    return wave


def _car(random: _Random) -> Wave:
    revs = random.uniform(38, 95) * (1 + random.uniform(0, 0.5) * np.clip(_wander(random, 4) + 0.5, -0.8, 1.5))
    cycle = 2 * np.pi * np.cumsum(revs) / SAMPLING_RATE
    wave = np.zeros(_SAMPLES)
    for harmonic in range(1, 11):
        wave += random.uniform(0.3, 1.0) / harmonic**0.6 * np.sin(harmonic * cycle + random.uniform(0, 6))
    wave *= 1 + 0.4 * np.sin(cycle / 2)
    return wave + _band_noise(random, 40, random.uniform(300, 900)) * random.uniform(0.3, 0.8)


def _clock(random: _Random) -> Wave:
    wave = np.zeros(_SAMPLES)
    pitches = random.uniform(1500, 4200) * np.array([1.0, random.uniform(0.7, 0.95)])
    decay = random.uniform(0.004, 0.014)
    time = _times(0.08)
    for index, onset in enumerate(_onsets(random, random.uniform(1.8, 5.5), 0.005)):
        click = np.sin(2 * np.pi * pitches[index % 2] * time) + 0.6 * random.standard_normal(time.size)
        _add(wave, click * np.exp(-time / decay), onset)
    return wave


def _dog(random: _Random) -> Wave:
    wave = np.zeros(_SAMPLES)
    voice, formant = random.uniform(220, 620), random.uniform(700, 1500)
    for onset in _onsets(random, random.uniform(1.3, 3.6), 0.12):
        length = random.uniform(0.11, 0.22)
        time = _times(length)
        pitch = voice * random.normal(1, 0.06) * (1.25 - 0.6 * np.abs(time / length - 0.3))
        cycle = 2 * np.pi * np.cumsum(pitch) / SAMPLING_RATE
        bark = np.zeros(time.size)
        for harmonic in range(1, 9):
            bark += np.exp(-(((voice * harmonic - formant) / 800) ** 2)) * np.sin(harmonic * cycle)
        bark += random.uniform(0.1, 0.35) * random.standard_normal(time.size)
        _add(wave, bark * _bump(length, 0.6), onset)
    return wave


def _drum(random: _Random) -> Wave:
    wave = np.zeros(_SAMPLES)
    pitch, decay, snares = random.uniform(55, 170), random.uniform(0.06, 0.2), random.uniform(0.02, 0.5)
    time = _times(0.6)
    cycle = pitch * time + 0.02 * pitch * (1 - np.exp(-time / 0.03))
    for onset in _onsets(random, random.uniform(1.5, 6.0), 0.03):
        hit = np.sin(2 * np.pi * cycle) * np.exp(-time / decay)
        hit += snares * random.standard_normal(time.size) * np.exp(-time / (0.4 * decay))
        _add(wave, hit * random.uniform(0.5, 1.0), onset)
    return wave


def _fire(random: _Random) -> Wave:
    time = _times(0.02)
    snap = np.exp(-time / random.uniform(0.0008, 0.003)) * np.sin(2 * np.pi * random.uniform(900, 3000) * time)
    crackle = _filtered(_impulses(random, random.uniform(12, 50), 0.9), snap)
    roar = _band_noise(random, 50, random.uniform(250, 600)) * (1 + 0.3 * np.tanh(_wander(random, 12)))
    return crackle / crackle.std() + roar * random.uniform(0.3, 0.8)


def _frog(random: _Random) -> Wave:
    wave = np.zeros(_SAMPLES)
    throat, pulses = random.uniform(380, 950), random.uniform(28, 70)
    for onset in _onsets(random, random.uniform(1.2, 3.0), 0.1):
        length = random.uniform(0.18, 0.34)
        time = _times(length)
        pulse = np.exp(-((time * pulses) % 1) * random.uniform(3, 5))
        pitch = throat * (1 + random.uniform(0.0, 0.3) * time / length)
        cycle = 2 * np.pi * np.cumsum(pitch) / SAMPLING_RATE
        _add(wave, pulse * (np.sin(cycle) + 0.4 * np.sin(2 * cycle)) * _bump(length, 0.5), onset)
    return wave


def _guitar(random: _Random) -> Wave:
    wave = np.zeros(_SAMPLES)
    scale = 2 ** (np.array([0, 2, 4, 7, 9, 12, 14, 16]) / 12)
    root, damping = random.uniform(85, 210), random.uniform(0.984, 0.996)
    for onset in _onsets(random, random.uniform(1.8, 5.0), 0.08):
        # Karplus-Strong, one period at a time: each period is the last one low-passed and damped.
        period = int(SAMPLING_RATE / (root * random.choice(scale)))
        string = random.uniform(-1, 1, period)
        periods = []
        for _ in range(max(1, int(0.9 * SAMPLING_RATE / period))):
            periods.append(string)
            string = damping * 0.5 * (string + np.roll(string, 1))
        _add(wave, np.concatenate(periods), onset)
    return wave


def _helicopter(random: _Random) -> Wave:
    rate = random.uniform(9, 19) * (1 + 0.03 * _wander(random, 4))
    chop = (0.5 + 0.5 * np.sin(2 * np.pi * np.cumsum(rate) / SAMPLING_RATE)) ** random.uniform(2, 6)
    blades = _band_noise(random, 40, random.uniform(350, 1100)) * chop
    turbine = _tone(random.uniform(1200, 2600)) * random.uniform(0.0, 0.12)
    return blades / blades.std() + turbine + 0.15 * _band_noise(random, 100, 2500)


def _kettle(random: _Random) -> Wave:
    rise = 1 + random.uniform(0.0, 0.18) * np.tanh(3 * (_TIME - random.uniform(0, 1.5)))
    pitch = random.uniform(1700, 3300) * rise * (1 + 0.003 * _wander(random, 40))
    whistle = _tone(pitch) + random.uniform(0.05, 0.4) * _tone(2 * pitch)
    steam = _band_noise(random, 1500, 6500) * random.uniform(0.2, 0.6)
    return (whistle + steam) * (0.75 + 0.25 * np.tanh(_wander(random, 8)))


def _rain(random: _Random) -> Wave:
    hiss = _band_noise(random, random.uniform(700, 1800), random.uniform(5000, 7800))
    time = _times(0.02)
    drop = np.exp(-time / random.uniform(0.002, 0.005)) * np.sin(2 * np.pi * random.uniform(1800, 4200) * time)
    drops = _filtered(_impulses(random, random.uniform(60, 220), 0.6), drop)
    return hiss * (1 + 0.1 * _wander(random, 6)) + drops / drops.std() * random.uniform(0.3, 0.9)


def _sea(random: _Random) -> Wave:
    swell = (0.5 + 0.5 * _tone(random.uniform(0.35, 0.8), random.uniform(0, 6))) ** random.uniform(1.2, 2.5)
    deep = _band_noise(random, 40, random.uniform(500, 1100)) * (0.2 + swell)
    foam = _band_noise(random, 800, random.uniform(3000, 6000)) * swell**1.5
    return deep + foam * random.uniform(0.4, 0.9)


def _siren(random: _Random) -> Wave:
    rate, phase = random.uniform(0.6, 3.2), random.uniform(0, 6)
    sweep = np.sin(2 * np.pi * rate * _TIME + phase)
    if random.random() < 0.35:
        sweep = np.tanh(12 * sweep)
    pitch = random.uniform(600, 1050) * (1 + random.uniform(0.18, 0.4) * sweep)
    cycle = 2 * np.pi * np.cumsum(pitch) / SAMPLING_RATE
    return sum((random.uniform(0.3, 1.0) / k * np.sin(k * cycle) for k in range(1, 5)), start=np.zeros(_SAMPLES))


def _telephone(random: _Random) -> Wave:
    low = random.uniform(420, 1300)
    high = low * random.uniform(1.15, 1.35)
    gate = np.tanh(20 * _tone(random.uniform(13, 26)))
    trill = _tone(low) * (1 + gate) + _tone(high) * (1 - gate) + 0.4 * _tone(3 * low) * (1 + gate)
    period, share = random.uniform(0.55, 1.4), random.uniform(0.45, 0.7)
    cadence = ((_TIME + random.uniform(0, period)) % period) < share * period
    return trill * cadence


def _train(random: _Random) -> Wave:
    wave = np.zeros(_SAMPLES)
    puff = _band_noise(random, 150, random.uniform(1200, 3200))
    rate = random.uniform(2.6, 6.5)
    length = 0.8 / rate
    for index, onset in enumerate(_onsets(random, rate, 0.02)):
        start = int(random.integers(0, _SAMPLES - 8000))
        event = puff[start : start + _times(length).size] * np.exp(-_times(length) * 3.5 / length)
        _add(wave, event * (1.0 if index % 4 == 0 else 0.6), onset)
    if random.random() < 0.6:
        root, length = random.uniform(280, 520), random.uniform(0.5, 1.2)
        time = _times(length)
        chord = np.array([np.sin(2 * np.pi * root * ratio * time) for ratio in (1.0, 1.26, 1.5)]).sum(axis=0)
        _add(wave, random.uniform(0.1, 0.35) * chord * _bump(length, 0.4), random.uniform(0, 1.4))
    return wave


def _windmill(random: _Random) -> Wave:
    # Wind howls through one moving resonance, which the sails cut once each as they pass.
    pitch = random.uniform(280, 750) * np.exp(0.25 * np.tanh(_wander(random, 6)))
    slow = _filtered(random.standard_normal(_SAMPLES), np.exp(-_times(0.05) * random.uniform(120, 220)))
    howl = slow * _tone(pitch)
    sails = 0.35 + (0.5 + 0.5 * _tone(random.uniform(1.4, 3.2), random.uniform(0, 6))) ** 2
    wave = howl / howl.std() * sails
    if random.random() < 0.6:
        length = random.uniform(0.25, 0.5)
        time = _times(length)
        creak = np.exp(-((time * random.uniform(25, 60) * (1 + time)) % 1) * 6) * np.sin(2 * np.pi * 1300 * time)
        _add(wave, random.uniform(0.5, 1.5) * creak * _bump(length), random.uniform(0, 1.5))
    return wave


_SOUNDS: dict[str, Callable[[_Random], Wave]] = {
    "bee": _bee,
    "bell": _bell,
    "bird": _bird,
    "car": _car,
    "clock": _clock,
    "dog": _dog,
    "drum": _drum,
    "fire": _fire,
    "frog": _frog,
    "guitar": _guitar,
    "helicopter": _helicopter,
    "kettle": _kettle,
    "rain": _rain,
    "sea": _sea,
    "siren": _siren,
    "telephone": _telephone,
    "train": _train,
    "windmill": _windmill,
}
