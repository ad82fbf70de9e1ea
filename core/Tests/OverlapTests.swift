import Testing

@testable import MFACore

/// Overlap analysis against a list of every byte.
@Suite struct OverlapTests {
    /// The bytes of every element, from a base of 0; an element that shares a byte with another makes the list shorter than its count says.
    private func bytes(_ tensor: Tensor, at base: Int) -> (all: Set<Int>, count: Int) {
        var all = Set<Int>()
        var count = 0
        let unit = tensor.precision.unitSize
        for b in 0..<tensor.shape[0] {
            for h in 0..<tensor.shape[1] {
                for s in 0..<tensor.shape[2] {
                    for d in 0..<tensor.shape[3] {
                        let first =
                            base + (b * tensor.strides[0] + h * tensor.strides[1] + s * tensor.strides[2] + d * tensor.strides[3]) * unit
                        for byte in first..<first + unit { all.insert(byte) }
                        count += unit
                    }
                }
            }
        }
        return (all, count)
    }

    private static let base = 1 << 20

    private func tensor(_ shape: Shape, _ strides: Strides, at offset: Int, _ precision: Precision = .fp16) -> Tensor {
        Tensor(UnsafeMutableRawPointer(bitPattern: OverlapTests.base + offset), precision: precision, shape: shape, strides: strides)
    }

    private func region(_ tensor: Tensor) throws -> MemoryRegion {
        try #require(MemoryRegion("tensor", tensor))
    }

    @Test func selfOverlapIsThatOfAListOfBytes() throws {
        var generator = SmallGenerator(state: 11)
        var overlapping = 0
        for _ in 0..<3000 {
            let shape = Shape((0..<4).map { _ in Int.random(in: 1...4, using: &generator) })
            let strides = Strides((0..<4).map { _ in Int.random(in: -20...20, using: &generator) })
            let tensor = tensor(shape, strides, at: 0)
            let (all, count) = bytes(tensor, at: 0)
            #expect(try region(tensor).overlapsItself == (all.count < count), "\(shape) \(strides)")
            overlapping += all.count < count ? 1 : 0
        }
        #expect(overlapping > 500 && overlapping < 2900, "both answers must occur often: \(overlapping) of 3000")
    }

    @Test func viewsOfEqualStridesOverlapWhereTheirBytesDo() throws {
        var generator = SmallGenerator(state: 12)
        var overlapping = 0
        for _ in 0..<3000 {
            let strides = Strides((0..<4).map { _ in [0, 1, 2, 3, 6, 12, -12, 24].randomElement(using: &generator) ?? 1 })
            let first = tensor(Shape((0..<4).map { _ in Int.random(in: 1...3, using: &generator) }), strides, at: 0)
            let offset = Int.random(in: -40...40, using: &generator)
            let second = tensor(Shape((0..<4).map { _ in Int.random(in: 1...3, using: &generator) }), strides, at: offset)
            let expected = !bytes(first, at: 0).all.isDisjoint(with: bytes(second, at: offset).all)
            let (one, other) = (try region(first), try region(second))
            #expect(one.overlaps(other) == expected, "\(first.shape) \(second.shape) \(strides) offset \(offset)")
            #expect(other.overlaps(one) == expected, "the same the other way round")
            overlapping += expected ? 1 : 0
        }
        #expect(overlapping > 500 && overlapping < 2500, "both answers must occur often: \(overlapping) of 3000")
    }

    @Test func slicesOfAPackedTensorDoNotOverlap() throws {
        // [B, S, 3, H, D]
        let (batch, tokens, heads, channels) = (2, 5, 3, 8)
        let strides = Strides(tokens * 3 * heads * channels, channels, 3 * heads * channels, 1)
        let slices = try (0..<3).map {
            try region(tensor(Shape(batch, heads, tokens, channels), strides, at: $0 * heads * channels * 2))
        }
        for (index, slice) in slices.enumerated() {
            #expect(!slice.overlapsItself)
            for other in slices[(index + 1)...] { #expect(!slice.overlaps(other)) }
            #expect(slice.overlaps(slice))
        }
        let shifted = try region(tensor(Shape(batch, heads, tokens, channels), strides, at: heads * channels * 2 - 2))
        #expect(shifted.overlaps(slices[0]))
        #expect(shifted.overlaps(slices[1]))
    }

    @Test func intersectingRangesOfUnlikeViewsOverlap() throws {
        let even = try region(tensor(Shape(1, 1, 1, 8), Strides(0, 0, 0, 2), at: 0))
        let odd = try region(tensor(Shape(1, 1, 1, 8), Strides(0, 0, 0, 2), at: 2))
        #expect(!even.overlaps(odd))
        let unlike = try region(tensor(Shape(1, 1, 1, 2), Strides(0, 0, 0, 4), at: 2))
        #expect(even.overlaps(unlike), "strides differ, so that nothing is shared is not looked for")
        let bytes = try region(tensor(Shape(1, 1, 1, 1), Strides(0, 0, 0, 2), at: 3, .int8))
        #expect(even.overlaps(bytes), "sizes differ")
    }

    @Test func nibblesCountAsTheirBytes() throws {
        // Transposed INT4, [B, H, ceil(D / 2), S] bytes.
        let shape = Shape(2, 2, 3, 5)
        let packed = Tensor(
            UnsafeMutableRawPointer(bitPattern: OverlapTests.base), precision: .int4, shape: shape, layout: .bhds)
        let whole = try region(packed)
        #expect(!whole.overlapsItself)
        #expect(whole.bytes.count == 2 * 2 * 3 * 3)
        #expect(whole.bytes.lowerBound == UInt(OverlapTests.base))
    }

    @Test func undecidedMeansOverlap() throws {
        // Strides that no program uses, and far too many sums for the budget: the answer must come at once, and be the safe one.
        let strides = Strides(1_000_003, 999_983, 999_979, 999_961)
        let tensor = tensor(Shape(1000, 1000, 1000, 1000), strides, at: 0)
        _ = try region(tensor).overlapsItself
        #expect(MemoryRegion("empty", self.tensor(Shape(0, 1, 1, 1), strides, at: 0)) == nil)
    }
}
