//! The pages that show what the paper evaluation has measured.
//!
//! | module | knows |
//! |---|---|
//! | [`record`] | what the runner writes of a run |
//! | [`figure2`] | what the micro-benchmark writes |
//! | [`names`] | policies, states and workloads, and their order |
//! | [`metrics`] | the figures of a run |
//! | [`stats`] | medians, spread, means |
//! | [`runs`] | which runs belong together |
//! | [`ablation`], [`losses`], [`goals`] | what follows from them |
//! | [`paper`] | the numbers of the Gemini paper |
//! | [`sections`] | what the page says |
//! | [`document`] | a page, however it is written |
//! | [`markdown`], [`html`] | how it is written |
//! | [`charts`], [`svg`] | plots |

#![allow(clippy::cast_precision_loss)] // counts of runs and pixels, far below 2^53

pub mod ablation;
pub mod charts;
pub mod document;
pub mod figure2;
pub mod goals;
pub mod html;
pub mod losses;
pub mod markdown;
pub mod metrics;
pub mod names;
pub mod paper;
pub mod record;
pub mod runs;
pub mod sections;
pub mod stats;
pub mod svg;
