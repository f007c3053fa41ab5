// Videos that play together. The longest one is the clock; the others follow it.
class Together {
  // onTime is called with the seconds that are shown and whether the videos play.
  constructor(videos, onTime = () => {}) {
    this.videos = videos;
    this.onTime = onTime;
    this.isPlaying = false;
    for (const video of videos) Object.assign(video, { muted: true, playsInline: true, loop: false });
  }
  get clock() {
    return this.videos.reduce((a, b) => ((b.duration || 0) > (a.duration || 0) ? b : a), this.videos[0]);
  }
  get seconds() {
    return this.clock?.duration || 0;
  }
  play() {
    if (this.isPlaying || !this.videos.length) return;
    this.isPlaying = true;
    if (this.clock.ended) this.place(0);
    this.begin();
    this.onTime(this.clock.currentTime, true);
    const tick = () => {
      if (!this.isPlaying) return;
      const clock = this.clock;
      if (clock.ended) {
        this.place(0);
        this.begin();
      } else {
        for (const video of this.videos) {
          // Players of one browser drift by a frame at most; a seek takes longer than it gains.
          const isLate = Math.abs(video.currentTime - clock.currentTime) > 0.25;
          if (isLate && clock.currentTime < video.duration) video.currentTime = clock.currentTime;
        }
      }
      this.onTime(clock.currentTime, true);
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }
  begin() {
    for (const video of this.videos) {
      // A phone that saves its battery lets nothing play by itself.
      if (!video.ended || this.clock === video) video.play().catch(() => this.stopIfNonePlays());
    }
  }
  stopIfNonePlays() {
    if (this.videos.every((video) => video.paused)) this.pause();
  }
  pause() {
    this.isPlaying = false;
    for (const video of this.videos) video.pause();
    this.onTime(this.clock?.currentTime ?? 0, false);
  }
  seek(seconds) {
    this.pause();
    this.place(seconds);
    this.onTime(seconds, false);
  }
  place(seconds) {
    for (const video of this.videos) video.currentTime = Math.min(seconds, video.duration || 0);
  }
}
