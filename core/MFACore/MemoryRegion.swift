// Which bytes a tensor touches, and whether two tensors, or two elements of one, can touch the same.

/// The elements of one tensor or array in memory: units of equal size at strided places.
struct MemoryRegion {
    /// Whose it is: an argument and, where it is one, a field of it.
    let name: StaticString
    let field: StaticString
    /// Address of the first unit.
    let base: UInt
    /// Bytes of a unit.
    let unit: Int
    let shape: Shape
    let strides: Strides
    /// All its bytes are in here.
    let bytes: Range<UInt>

    /// Nil for a tensor without elements. The tensor's sizes were checked.
    init?(_ name: StaticString, _ tensor: Tensor) {
        guard tensor.hasElements, let address = tensor.address, let reach = tensor.reach else { return nil }
        self.name = name
        field = ""
        base = UInt(bitPattern: address)
        unit = tensor.precision.unitSize
        (shape, strides) = tensor.units
        bytes = base &- UInt(reach.below * unit)..<base &+ UInt(reach.above * unit + unit)
    }

    /// A contiguous array; nil if it is absent or empty.
    init?(_ name: StaticString, field: StaticString = "", _ array: UnsafeRawPointer?, count: Int, unit: Int) {
        guard let array, count > 0 else { return nil }
        self.name = name
        self.field = field
        base = UInt(bitPattern: array)
        self.unit = unit
        shape = Shape(count, 1, 1, 1)
        strides = Strides(count > 1 ? 1 : 0, 0, 0, 0)
        bytes = base..<base &+ UInt(count * unit)
    }

    /// Whether a byte can belong to both. Regions whose byte ranges intersect are taken to overlap, unless they have equal strides and units
    /// and it can be shown that no unit of the one touches a unit of the other, as with the slices of a packed tensor.
    func overlaps(_ other: MemoryRegion) -> Bool {
        guard bytes.overlaps(other.bytes) else { return false }
        guard unit == other.unit else { return true }
        var terms = IndexDifferences()
        for axis in 0..<4 {
            // An axis of one element has no stride of its own and takes the other's.
            let stride = shape[axis] > 1 ? strides[axis] : other.strides[axis]
            if other.shape[axis] > 1 && other.strides[axis] != stride { return true }
            terms.append(stride: stride, lowest: -(other.shape[axis] - 1), highest: shape[axis] - 1)
        }
        // Units touch where the distance of their addresses is less than a unit: sum(difference * stride) * unit = other.base - base, or, if
        // the bases are not a whole number of units apart, the whole number on either side of it.
        let distance = Int(bitPattern: other.base &- base)
        let whole = distance >= 0 || distance % unit == 0 ? distance / unit : distance / unit - 1
        if terms.canReach(whole) { return true }
        return distance % unit != 0 && terms.canReach(whole + 1)
    }

    /// Whether two elements of this region can be the same byte.
    var overlapsItself: Bool {
        var terms = IndexDifferences()
        for axis in 0..<4 { terms.append(stride: strides[axis], lowest: -(shape[axis] - 1), highest: shape[axis] - 1) }
        return terms.canCancel
    }
}

/// The sums of difference * stride over the axes, each difference of two indices from a range that holds 0.
private struct IndexDifferences {
    private struct Axis {
        var stride = 0
        var lowest = 0
        var highest = 0
    }

    private var axes = (Axis(), Axis(), Axis(), Axis())
    private var count = 0

    /// Adds an axis; one without a difference other than 0 is left out. Strides are made positive, and the largest comes first.
    mutating func append(stride: Int, lowest: Int, highest: Int) {
        guard lowest < 0 || highest > 0 else { return }
        var axis = Axis(stride: stride, lowest: lowest, highest: highest)
        if stride < 0 { axis = Axis(stride: -stride, lowest: -highest, highest: -lowest) }
        var place = count
        while place > 0 && self[place - 1].stride < axis.stride {
            self[place] = self[place - 1]
            place -= 1
        }
        self[place] = axis
        count += 1
    }

    private subscript(index: Int) -> Axis {
        get {
            switch index {
            case 0: axes.0
            case 1: axes.1
            case 2: axes.2
            default: axes.3
            }
        }
        set {
            switch index {
            case 0: axes.0 = newValue
            case 1: axes.1 = newValue
            case 2: axes.2 = newValue
            default: axes.3 = newValue
            }
        }
    }

    /// Whether the sum can be `target`, or that could not be decided within the budget.
    func canReach(_ target: Int) -> Bool {
        var budget = IndexDifferences.budget
        return search(from: 0, target: target, mustDiffer: false, &budget)
    }

    /// Whether the sum can be 0 with a difference that is not, or that could not be decided within the budget.
    var canCancel: Bool {
        var budget = IndexDifferences.budget
        return search(from: 0, target: 0, mustDiffer: true, &budget)
    }

    /// Nodes of a search. Layouts that programs use need a few; one that needs more is treated as overlapping.
    private static let budget = 4096

    private func search(from first: Int, target: Int, mustDiffer: Bool, _ budget: inout Int) -> Bool {
        budget -= 1
        if budget < 0 { return true }
        if first == count { return target == 0 && !mustDiffer }
        let axis = self[first]
        if axis.stride == 0 {
            // Only strides of 0 are left: any difference will do.
            return target == 0
        }
        var lowest = 0
        var highest = 0
        var divisor = axis.stride
        for index in first + 1..<max(count, first + 1) {
            lowest += self[index].stride * self[index].lowest
            highest += self[index].stride * self[index].highest
            divisor = greatestCommonDivisor(divisor, self[index].stride)
        }
        if target % divisor != 0 { return false }
        // The differences here that leave a rest which the smaller strides can make up.
        let from = max(axis.lowest, ceilingDivide(target - highest, axis.stride))
        let to = min(axis.highest, floorDivide(target - lowest, axis.stride))
        if from > to { return false }
        for difference in from...to
        where search(from: first + 1, target: target - difference * axis.stride, mustDiffer: mustDiffer && difference == 0, &budget) {
            return true
        }
        return false
    }
}

private func greatestCommonDivisor(_ first: Int, _ second: Int) -> Int {
    var (larger, smaller) = (first, second)
    while smaller != 0 { (larger, smaller) = (smaller, larger % smaller) }
    return larger
}

/// Of a positive divisor.
private func floorDivide(_ dividend: Int, _ divisor: Int) -> Int {
    dividend / divisor - (dividend % divisor < 0 ? 1 : 0)
}

/// Of a positive divisor.
private func ceilingDivide(_ dividend: Int, _ divisor: Int) -> Int {
    dividend / divisor + (dividend % divisor > 0 ? 1 : 0)
}
