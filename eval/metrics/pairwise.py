"""All pairs of rows of two feature matrices, block by block: float32's speed, float64's decisions.

A block of centred float32 inner products serves both the kernel of KID and the squared distances.
For distances it only screens: what it leaves open, because float32's rounding error could change
the answer, is computed again from the rows themselves, by differences in float64. So the answer
does not depend on blocks, a shift of the features costs nothing, and equal rows are at distance 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ROWS = 1024  # of a block: its products, 4 MB, stay in the processor's cache
ELEMENTS = 2**17  # of two sets of rows whose differences are taken at once: 1 MB in float64
NEIGHBOURS = (1, 3, 5)  # orders of the nearest neighbours that metrics ask for
CANDIDATES = 12  # rows that float32 proposes for the five nearest
UNIT = 2.0**-24  # float32's rounding error
LEAST = 2.0**-120  # more than what a product can lose by underflow


class Cloud:
    """Features [N,D], float32 or float64, as points around their mean."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        total = torch.zeros(features.shape[1], dtype=torch.float64)
        for rows in self.spans():
            total += features[rows].double().sum(0)
        self.mean = total / len(features)  # float64 [D]
        # Float32 features minus a float32 centre lose next to nothing.
        self.centre = self.mean.to(features.dtype)

    def __len__(self) -> int:
        return len(self.features)

    @cached_property
    def squares(self) -> Tensor:
        """Squared distances from the centre, float64 [N]."""
        out = torch.empty(len(self), dtype=torch.float64)
        for rows in self.spans():
            out[rows] = self._from_centre(rows).square_().sum(1)
        return out

    def spans(self) -> list[slice]:
        """Consecutive spans of at most ROWS rows that cover all N."""
        return [slice(start, min(start + ROWS, len(self))) for start in range(0, len(self), ROWS)]

    def centred(self, rows: slice) -> Tensor:
        """Rows minus the centre, float32 [n,D]."""
        return (self.features[rows] - self.centre).float()

    def along(self, directions: Tensor) -> Tensor:
        """Inner products [N,a] of centred rows with directions [D,a], in float64."""
        out = torch.empty(len(self), directions.shape[1], dtype=torch.float64)
        for rows in self.spans():
            out[rows] = self._from_centre(rows) @ directions
        return out

    def covariance(self) -> Tensor:
        """Unbiased covariance, float64 [D,D].

        Summed over centred float64 blocks, as float32 would spoil it beyond 1e-7.
        """
        total = torch.zeros(self.features.shape[1], self.features.shape[1], dtype=torch.float64)
        for rows in self.spans():
            part = self.features[rows].double() - self.mean
            total += product(part.T, part)
        return total.div_(len(self) - 1)

    def _from_centre(self, rows: slice) -> Tensor:
        return self.features[rows].double() - self.centre.double()


class RowPairs:
    """Pairs of rows of x [N,D] and y [M,D]; where y is x, blocks on and above the diagonal only.

    With centres c, primes for centred rows and s = c_x - c_y:
        x.y = x'.y' + (x'.c_y + c_x.c_y) + y'.c_x
        |x - y|^2 = (|x'|^2 + 2 x'.s + |s|^2) + (|y'|^2 - 2 y'.s) - 2 x'.y'
    Every term but x'.y' is a float64 number per row.
    """

    def __init__(self, x: Cloud, y: Cloud) -> None:
        self.x = x
        self.y = y
        self.width = x.features.shape[1]
        x_centre = x.centre.double()
        y_centre = y.centre.double()
        shift = x_centre - y_centre
        gap = shift @ shift
        x_along = x.along(torch.stack([y_centre, shift], dim=1))
        y_along = x_along if x is y else y.along(torch.stack([x_centre, shift], dim=1))
        self.x_kernel = (x_along[:, 0] + x_centre @ y_centre) / self.width + 1
        self.y_kernel = y_along[:, 0] / self.width
        # Bound of the float32 error of a squared distance, x_error[i] + y_error[j]. In whatever
        # order D products are summed, x'.y' is off by at most D UNIT |x'||y'| (Higham 2002, sec.
        # 3.1); 32 covers rounding of rows and sums.
        bound = (self.width + 32) * UNIT
        self.x_error = bound * (x.squares + gap / 2) + self.width * LEAST
        self.y_error = bound * (y.squares + gap / 2) + self.width * LEAST
        self.x_low = (x.squares + 2 * x_along[:, 1] + gap - self.x_error).float()
        self.y_low = (y.squares - 2 * y_along[:, 1] - self.y_error).float()

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows of x, rows of y, and their inner products, float32 [rows,cols]."""
        for rows in self.x.spans():
            part = self.x.centred(rows)
            for cols in self.y.spans():
                if self.x is not self.y or cols.start >= rows.start:
                    yield rows, cols, product(part, self.y.centred(cols).T)

    def kernel_sum(self, rows: slice, cols: slice, products: Tensor) -> float:
        """Sum of (x.y/D + 1)^3 over a block of products.

        Where y is x, over all ordered pairs of two rows that the block stands for.
        """
        kernel = products.double().div_(self.width)
        kernel.add_(self.x_kernel[rows, None]).add_(self.y_kernel[cols])
        if self.x is not self.y:
            return _sum_of_cubes(kernel)
        if rows == cols:
            kernel.fill_diagonal_(0)
            return _sum_of_cubes(kernel)
        return 2 * _sum_of_cubes(kernel)

    def lower_(self, rows: slice, cols: slice, products: Tensor) -> Tensor:
        """Products of a block turned, in place, into lower bounds of squared distances."""
        return products.mul_(-2).add_(self.x_low[rows, None]).add_(self.y_low[cols])

    def near(
        self, rows: slice, cols: slice, lower: Tensor, x_limits: Tensor, y_limits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs (i, j) of a block within any limit, and their squared distances, float64.

        Limits are squared distances float64 [N,a] and [M,b] of rows of x and y. The distances
        returned are on the true side of every limit, and exact where that could be in doubt.
        """
        # Limits are rounded up to float32, since a pair at exactly the limit counts.
        row_limit = _above(x_limits[rows].amax(1))
        col_limit = _above(y_limits[cols].amax(1))
        within_limit = lower <= torch.maximum(row_limit[:, None], col_limit)
        row, col = within_limit.nonzero(as_tuple=True)
        squared = lower[row, col].double()
        i = row + rows.start
        j = col + cols.start
        error = self.x_error[i] + self.y_error[j]
        squared += error  # the middle of what it may be
        in_doubt = torch.zeros(len(i), dtype=torch.bool)
        for limits, index in ((x_limits, i), (y_limits, j)):
            for limit in limits.T:
                in_doubt |= (squared - limit[index]).abs() <= error
        squared[in_doubt] = squared_distances(
            self.x.features, i[in_doubt], self.y.features, j[in_doubt]
        )
        return i, j, squared


@dataclass(frozen=True)
class Within:
    """Outcome of one pass over the pairs within one cloud [N,D].

    kernel_sum: of (x.y/D + 1)^3 over ordered pairs of two rows; radii: float64
    [N', len(NEIGHBOURS)], squared distance to the k-th nearest other row of the same piece, where
    N' <= N leaves out an incomplete last piece.
    """

    kernel_sum: float
    radii: Tensor


def within(cloud: Cloud, piece: int) -> Within:
    """Kernel sum over the whole cloud; radii within consecutive pieces of `piece` rows.

    An incomplete last piece is left out of the radii.
    """
    pairs = RowPairs(cloud, cloud)
    stop = len(cloud) // piece * piece
    lowest = torch.full((stop, CANDIDATES), torch.inf)
    nearest = torch.zeros((stop, CANDIDATES), dtype=torch.long)
    kernel_sum = 0.0

    def propose(rows: slice, cols: slice, lower: Tensor) -> None:
        found = lower.topk(min(CANDIDATES, lower.shape[1]), dim=1, largest=False)
        value = torch.cat([lowest[rows], found.values], dim=1)
        index = torch.cat([nearest[rows], found.indices + cols.start], dim=1)
        lowest[rows], best = value.topk(CANDIDATES, dim=1, largest=False)
        nearest[rows] = index.gather(1, best)

    for rows, cols, products in pairs.blocks():
        kernel_sum += pairs.kernel_sum(rows, cols, products)
        shared = list(_shared(rows, cols, piece, stop))
        lower = pairs.lower_(rows, cols, products) if shared else products
        if rows == cols:
            lower.fill_diagonal_(torch.inf)  # a row is no neighbour of itself
        for r, c in shared:
            in_block = slice(r.start - rows.start, r.stop - rows.start)
            across = slice(c.start - cols.start, c.stop - cols.start)
            part = lower[in_block, across]
            propose(r, c, part)
            if rows != cols:
                propose(c, r, part.T.contiguous())
    return Within(kernel_sum, _radii(cloud.features, lowest, nearest, piece))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b by numpy's BLAS.

    On AMD processors that is faster than torch's (float32 by a fifth), and a^T a is at half the
    price.
    """
    return torch.from_numpy(a.numpy() @ b.numpy())


def squared_distances(x: Tensor, i: Tensor, y: Tensor, j: Tensor) -> Tensor:
    """|x_i - y_j|^2 of pairs of rows, float64 [len(i)], by differences.

    Exactly 0 for equal rows, and the same number for (j, i).
    """
    out = torch.empty(len(i), dtype=torch.float64)
    step = max(1, ELEMENTS // x.shape[1])
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        out[part] = x[i[part]].double().sub_(y[j[part]]).square_().sum(1)
    return out


def _sum_of_cubes(kernel: Tensor) -> float:
    return torch.dot(kernel.square().flatten(), kernel.flatten()).item()


def _radii(features: Tensor, lowest: Tensor, nearest: Tensor, piece: int) -> Tensor:
    """Exact radii from candidates [N,CANDIDATES] and lower bounds of their squared distances."""
    columns = [order - 1 for order in NEIGHBOURS]

    def exact(rows: Tensor) -> Tensor:
        candidates = nearest[rows]
        own = rows.repeat_interleave(CANDIDATES)
        flat = squared_distances(features, own, features, candidates.flatten())
        found = flat.view(candidates.shape)
        found[lowest[rows] == torch.inf] = torch.inf  # a place that no row took
        return found.sort(1).values[:, columns]

    radii = exact(torch.arange(len(lowest)))
    # No row but the candidates is nearer than the last lower bound. Where that leaves doubt (many
    # rows within float32's error of each other), the candidates are chosen again, from float64
    # differences with every row of the piece.
    is_open = radii[:, -1] > lowest[:, -1].double().clamp_min(0)
    for rows in is_open.nonzero().flatten().split(64):
        starts = rows.div(piece, rounding_mode="floor").unique().mul(piece)
        for start in starts.tolist():
            mine = rows[(rows >= start) & (rows < start + piece)]
            value, index = _direct(features, mine, slice(start, start + piece))
            chosen = value.topk(min(CANDIDATES, value.shape[1]), dim=1, largest=False).indices
            nearest[mine[:, None], torch.arange(chosen.shape[1])] = index.gather(1, chosen)
            radii[mine] = exact(mine)
    return radii


def _direct(features: Tensor, rows: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
    """Distances and indices of candidates in a piece for each of `rows`, in float64.

    Without inner products. Of every ROWS rows of the piece, the CANDIDATES nearest.
    """
    values = []
    indices = []
    for start in range(piece.start, piece.stop, ROWS):
        stop = min(start + ROWS, piece.stop)
        gap = torch.cdist(
            features[rows].double(),
            features[start:stop].double(),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        gap[rows[:, None] == torch.arange(start, stop)] = torch.inf
        found = gap.topk(min(CANDIDATES, gap.shape[1]), dim=1, largest=False)
        values.append(found.values)
        indices.append(found.indices + start)
    return torch.cat(values, dim=1), torch.cat(indices, dim=1)


def _shared(rows: slice, cols: slice, piece: int, stop: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a block whose rows and columns are of one piece, for pieces that end by `stop`."""
    for start in range(rows.start // piece * piece, min(rows.stop, stop), piece):
        r = slice(max(start, rows.start), min(start + piece, rows.stop))
        c = slice(max(start, cols.start), min(start + piece, cols.stop))
        if r.start < r.stop and c.start < c.stop:
            yield r, c


def _above(limits: Tensor) -> Tensor:
    """The least float32 that is not below a float64."""
    rounded = limits.float()
    next_up = rounded.nextafter(torch.tensor(torch.inf))
    return torch.where(rounded.double() < limits, next_up, rounded)
