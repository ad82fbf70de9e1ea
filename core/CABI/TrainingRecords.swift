import MFACore

/// How a flat forward call read its operands: what the backward calls, which are not told, must know.
struct TrainingRecord {
    let call: FlatCall
    let query: FlatOperand
    let key: FlatOperand
    let value: FlatOperand
    let softmaxScale: Float
    let causal: Bool
}

/// The records of a context under the addresses of their logsumexp, which are keys and never read. The oldest is dropped first.
struct TrainingRecords {
    static let capacity = 4096

    private struct Entry {
        let record: TrainingRecord
        let age: UInt64
    }

    private var entries: [UInt: Entry] = [:]
    /// Addresses in the order in which records came. One that was replaced or removed since has no entry of that age.
    private var arrivals: [(address: UInt, age: UInt64)] = []
    /// Of the next record.
    private var age: UInt64 = 0

    var count: Int { entries.count }

    /// The record of an address.
    subscript(address: UInt) -> TrainingRecord? { entries[address]?.record }

    /// Keeps a record, in place of one that has this address.
    mutating func insert(_ record: TrainingRecord, at address: UInt) {
        entries[address] = Entry(record: record, age: age)
        arrivals.append((address, age))
        age += 1
        if arrivals.count > 2 * TrainingRecords.capacity || entries.count > TrainingRecords.capacity { tidy() }
    }

    /// Removes the record of an address, if there is one.
    mutating func remove(_ address: UInt) {
        entries[address] = nil
    }

    /// Drops arrivals that are no more, and the oldest record if there are too many.
    private mutating func tidy() {
        arrivals.removeAll { entries[$0.address]?.age != $0.age }
        let excess = entries.count - TrainingRecords.capacity
        guard excess > 0 else { return }
        for arrival in arrivals.prefix(excess) { entries[arrival.address] = nil }
        arrivals.removeFirst(excess)
    }
}
