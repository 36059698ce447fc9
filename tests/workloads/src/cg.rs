//! Conjugate gradients on a random sparse symmetric matrix, in the style of the
//! NAS Parallel Benchmarks' CG, and not comparable with it.

use anyhow::ensure;

use crate::load::Load;
use crate::rng::Rng;
use crate::Options;

/// Entries of a row beside the one on the diagonal, on average: even.
const ROW: u64 = 14;

/// Bytes of a row: its entries, the diagonal's, where it begins, and an element
/// of each vector.
const ROW_BYTES: u64 = ROW * (8 + 4) + 8 + 8 + 5 * 8;

/// Iterations after which the solution becomes the next right-hand side.
const ITERATIONS: u32 = 25;

/// What the diagonal is above the sum of the rest of its row: so the matrix is
/// positive definite, and 25 iterations are too few to be done.
const MARGIN: f64 = 0.1;

/// The matrix, and the vectors of the iteration.
pub struct Cg {
    /// Place of each row's first entry in `columns` and `values`, and their end.
    rows: Vec<usize>,
    columns: Vec<u32>,
    values: Vec<f64>,
    diagonal: Vec<f64>,
    right: Vec<f64>,
    solution: Vec<f64>,
    residual: Vec<f64>,
    direction: Vec<f64>,
    product: Vec<f64>,
    residual_square: f64,
    iteration: u32,
}

/// An entry above the diagonal, or its mirror image.
struct Entry {
    row: usize,
    column: usize,
    value: f64,
}

impl Cg {
    /// A matrix that has `options.mib` MiB with its vectors.
    ///
    /// # Errors
    /// If column numbers would be too large.
    pub fn new(options: Options) -> anyhow::Result<Self> {
        let count = usize::try_from((options.mib << 20) / ROW_BYTES)?;
        ensure!(u32::try_from(count).is_ok(), "{count} rows are too many");
        let pairs = count as u64 * ROW / 2;
        // The same pairs twice: once to count, once to fill.
        let entries = || {
            let mut rng = Rng::new(options.seed);
            (0..pairs).flat_map(move |_| mirrored(&mut rng, count))
        };
        let mut rows = vec![0; count + 1];
        for entry in entries() {
            rows[entry.row + 1] += 1;
        }
        for row in 0..count {
            rows[row + 1] += rows[row];
        }
        let mut next = rows.clone();
        let mut columns = vec![0; rows[count]];
        let mut values = vec![0.0; rows[count]];
        let mut diagonal = vec![MARGIN; count];
        for entry in entries() {
            let place = next[entry.row];
            next[entry.row] += 1;
            columns[place] = u32::try_from(entry.column)?;
            values[place] = entry.value;
            diagonal[entry.row] += entry.value;
        }
        drop(next);
        let zeros = || vec![0.0; count];
        Ok(Cg {
            rows,
            columns,
            values,
            diagonal,
            right: vec![1.0; count],
            solution: zeros(),
            residual: zeros(),
            direction: zeros(),
            product: zeros(),
            residual_square: 0.0,
            iteration: ITERATIONS,
        })
    }

    /// Starts to solve for the right-hand side, at zeros.
    fn restart(&mut self) {
        self.solution.fill(0.0);
        self.residual.copy_from_slice(&self.right);
        self.direction.copy_from_slice(&self.right);
        self.residual_square = dot(&self.right, &self.right);
        self.iteration = 0;
    }

    /// Takes the solution, scaled to the length that ones have, as the next
    /// right-hand side.
    fn next_right_side(&mut self) {
        let length = dot(&self.solution, &self.solution);
        let scale = (self.solution.len() as f64 / length).sqrt();
        for (right, solution) in self.right.iter_mut().zip(&self.solution) {
            *right = solution * scale;
        }
    }

    fn multiply(&mut self) {
        for (row, product) in self.product.iter_mut().enumerate() {
            let entries = self.rows[row]..self.rows[row + 1];
            let mut sum = self.diagonal[row] * self.direction[row];
            for (&column, value) in self.columns[entries.clone()].iter().zip(&self.values[entries])
            {
                sum += value * self.direction[column as usize];
            }
            *product = sum;
        }
    }

    fn iterate(&mut self) {
        self.multiply();
        let step = self.residual_square / dot(&self.direction, &self.product);
        add(&mut self.solution, step, &self.direction);
        add(&mut self.residual, -step, &self.product);
        let square = dot(&self.residual, &self.residual);
        let share = square / self.residual_square;
        for (direction, residual) in self.direction.iter_mut().zip(&self.residual) {
            *direction = residual + share * *direction;
        }
        self.residual_square = square;
        self.iteration += 1;
    }
}

/// A random entry off the diagonal, and its mirror image.
fn mirrored(rng: &mut Rng, count: usize) -> [Entry; 2] {
    let bits = rng.any();
    // Two numbers below `count`, which has at most 32 bits: exact in 64.
    let scaled = |half: u64| usize::try_from((half * count as u64) >> 32).unwrap_or(0);
    let (row, mut column) = (scaled(bits >> 32), scaled(bits & 0xffff_ffff));
    if row == column {
        column = (column + 1) % count;
    }
    let value = (bits % 1000 + 1) as f64 / 1000.0;
    [Entry { row, column, value }, Entry { row: column, column: row, value }]
}

fn dot(one: &[f64], other: &[f64]) -> f64 {
    one.iter().zip(other).map(|(one, other)| one * other).sum()
}

fn add(to: &mut [f64], factor: f64, from: &[f64]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

impl Load for Cg {
    fn unit(&self) -> &'static str {
        "iterations"
    }

    fn version(&self) -> String {
        concat!("cg ", env!("CARGO_PKG_VERSION")).into()
    }

    fn server(&self) -> Option<u32> {
        None
    }

    fn begin(&mut self) -> anyhow::Result<()> {
        self.right.fill(1.0);
        self.restart();
        Ok(())
    }

    fn operate(&mut self, _: &mut Rng) -> anyhow::Result<u64> {
        if self.iteration == ITERATIONS {
            self.next_right_side();
            self.restart();
        }
        self.iterate();
        ensure!(self.residual_square.is_finite(), "the iteration diverges");
        Ok(self.residual_square.to_bits())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_solution_solves() {
        let mut cg = Cg::new(Options { mib: 1, seed: 1, operations: 1 }).expect("1 MiB");
        let mut rng = Rng::new(1);
        cg.begin().expect("it begins");
        let first = dot(&cg.residual, &cg.residual);
        for _ in 0..ITERATIONS {
            cg.operate(&mut rng).expect("it converges");
        }
        cg.direction.clone_from(&cg.solution);
        cg.multiply();
        let error: f64 =
            cg.product.iter().zip(&cg.right).map(|(left, right)| (left - right).powi(2)).sum();
        assert!(error < first / 1e6, "{error} of {first}");
        assert!((error / cg.residual_square - 1.0).abs() < 1e-3, "{error}");
        // And on with the next right-hand side.
        cg.operate(&mut rng).expect("it goes on");
        assert_eq!(cg.iteration, 1);
    }
}
