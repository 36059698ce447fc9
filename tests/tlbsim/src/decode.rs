//! Instructions that flush TLBs or change what page tables are in use.
//!
//! An emulator's plugin sees instructions and accesses to memory, and none of
//! what the emulator does to its own TLB: these instructions are how a guest
//! tells a processor. Source: Intel SDM volume 2.

/// Such an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instruction {
    /// MOV to CR3.
    WriteCr3,
    /// MOV to CR0 or CR4, RSM, INVPCID, or INVLPG with an address in a form that
    /// is not worked out: everything is to be flushed.
    FlushAll,
    /// INVLPG.
    FlushPage(Operand),
}

/// The address of a memory operand: base + (index << scale) + displacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// Number of the base register.
    pub base: u8,
    /// Number of the index register, if there is one.
    pub index: Option<u8>,
    /// log2 of what the index is multiplied by.
    pub scale: u8,
    /// The displacement.
    pub displacement: i32,
}

impl Operand {
    /// The address, with the values of registers by their number.
    #[must_use]
    pub fn address(&self, register: impl Fn(u8) -> u64) -> u64 {
        let index = self.index.map_or(0, |index| register(index) << self.scale);
        register(self.base).wrapping_add(index).wrapping_add_signed(i64::from(self.displacement))
    }
}

// Where things are in the word that an instruction is packed into.
const KIND_CR3: u64 = 1;
const KIND_ALL: u64 = 2;
const KIND_PAGE: u64 = 3;
const NO_INDEX: u64 = 16;

impl Instruction {
    /// Makes one word of it, to be handed through an interface for pointers.
    #[must_use]
    pub fn pack(self) -> u64 {
        match self {
            Instruction::WriteCr3 => KIND_CR3,
            Instruction::FlushAll => KIND_ALL,
            Instruction::FlushPage(operand) => {
                let index = operand.index.map_or(NO_INDEX, u64::from);
                KIND_PAGE
                    | u64::from(operand.base) << 4
                    | index << 8
                    | u64::from(operand.scale) << 16
                    | u64::from(u32::from_le_bytes(operand.displacement.to_le_bytes())) << 32
            }
        }
    }

    /// What was packed; a word that no instruction makes is taken for
    /// [`Instruction::FlushAll`].
    #[must_use]
    pub fn unpack(word: u64) -> Self {
        let byte = |shift: u32, mask: u8| (word >> shift).to_le_bytes()[0] & mask;
        match word & 0xf {
            KIND_CR3 => Instruction::WriteCr3,
            KIND_PAGE => {
                let index = byte(8, 0x1f);
                let displacement = (word >> 32).to_le_bytes();
                Instruction::FlushPage(Operand {
                    base: byte(4, 0xf),
                    index: (u64::from(index) != NO_INDEX).then_some(index),
                    scale: byte(16, 3),
                    displacement: i32::from_le_bytes([
                        displacement[0],
                        displacement[1],
                        displacement[2],
                        displacement[3],
                    ]),
                })
            }
            _ => Instruction::FlushAll,
        }
    }

    /// Recognises an instruction of 64-bit mode by its bytes.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut bytes = bytes;
        let (mut rex, mut operand_size, mut segment) = (0, false, false);
        loop {
            match bytes.split_first()? {
                (0x66, rest) => (operand_size, bytes) = (true, rest),
                (0x64 | 0x65, rest) => (segment, bytes) = (true, rest),
                (0x2e | 0x36 | 0x3e | 0x26 | 0xf0 | 0xf2 | 0xf3, rest) => bytes = rest,
                _ => break,
            }
        }
        if let (&prefix @ 0x40..=0x4f, rest) = bytes.split_first()? {
            (rex, bytes) = (prefix, rest);
        }
        match bytes {
            // RSM
            [0x0f, 0xaa, ..] => Some(Instruction::FlushAll),
            // INVPCID
            [0x0f, 0x38, 0x82, ..] if operand_size => Some(Instruction::FlushAll),
            // MOV to a control register; REX.R makes it CR8 or a higher one.
            [0x0f, 0x22, modrm, ..] if rex & 4 == 0 => match modrm >> 3 & 7 {
                3 => Some(Instruction::WriteCr3),
                0 | 4 => Some(Instruction::FlushAll),
                _ => None,
            },
            // INVLPG; with two registers this opcode is another instruction.
            [0x0f, 0x01, modrm, rest @ ..] if modrm >> 3 & 7 == 7 && modrm >> 6 != 3 => {
                let operand = if segment { None } else { memory_operand(rex, *modrm, rest) };
                Some(operand.map_or(Instruction::FlushAll, Instruction::FlushPage))
            }
            _ => None,
        }
    }
}

/// The memory operand of a ModRM byte and what follows it; `None` for forms
/// without a base register.
fn memory_operand(rex: u8, modrm: u8, rest: &[u8]) -> Option<Operand> {
    let mode = modrm >> 6;
    let mut rest = rest;
    let (mut base, mut index, mut scale) = (modrm & 7, None, 0);
    if base == 4 {
        let (&sib, after) = rest.split_first()?;
        rest = after;
        base = sib & 7;
        let number = sib >> 3 & 7 | (rex & 2) << 2;
        index = (number != 4).then_some(number);
        scale = sib >> 6;
    }
    if mode == 0 && base == 5 {
        return None;
    }
    let displacement = match mode {
        0 => 0,
        1 => i32::from(i8::from_le_bytes([*rest.first()?])),
        _ => i32::from_le_bytes(rest.get(..4)?.try_into().ok()?),
    };
    Some(Operand { base: base | (rex & 1) << 3, index, scale, displacement })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(base: u8, index: Option<u8>, scale: u8, displacement: i32) -> Option<Instruction> {
        Some(Instruction::FlushPage(Operand { base, index, scale, displacement }))
    }

    #[test]
    fn what_linux_uses_is_recognised() {
        // mov %rax,%cr3; mov %r12,%cr3; mov %rdi,%cr4; mov %rbx,%cr0
        assert_eq!(Instruction::decode(&[0x0f, 0x22, 0xd8]), Some(Instruction::WriteCr3));
        assert_eq!(Instruction::decode(&[0x41, 0x0f, 0x22, 0xdc]), Some(Instruction::WriteCr3));
        assert_eq!(Instruction::decode(&[0x0f, 0x22, 0xe7]), Some(Instruction::FlushAll));
        assert_eq!(Instruction::decode(&[0x0f, 0x22, 0xc3]), Some(Instruction::FlushAll));
        // invlpg (%rax); invlpg (%r13) has a displacement of 0
        assert_eq!(Instruction::decode(&[0x0f, 0x01, 0x38]), page(0, None, 0, 0));
        assert_eq!(Instruction::decode(&[0x41, 0x0f, 0x01, 0x7d, 0x00]), page(13, None, 0, 0));
        // invpcid (%rsp),%rax
        let invpcid = [0x66, 0x0f, 0x38, 0x82, 0x04, 0x24];
        assert_eq!(Instruction::decode(&invpcid), Some(Instruction::FlushAll));
    }

    #[test]
    fn addresses_with_index_and_displacement_are_worked_out() {
        // invlpg -0x1000(%rbx,%r9,8)
        let bytes = [0x42, 0x0f, 0x01, 0xbc, 0xcb, 0x00, 0xf0, 0xff, 0xff];
        assert_eq!(Instruction::decode(&bytes), page(3, Some(9), 3, -0x1000));
        // invlpg 0x10(%rsp): an SIB byte without an index
        let bytes = [0x0f, 0x01, 0x7c, 0x24, 0x10];
        assert_eq!(Instruction::decode(&bytes), page(4, None, 0, 0x10));
        let operand = Operand { base: 3, index: Some(9), scale: 3, displacement: -0x1000 };
        let register = |number| if number == 3 { 0x10_0000 } else { 0x200 };
        assert_eq!(operand.address(register), 0x10_0000 + 0x1000 - 0x1000);
    }

    #[test]
    fn forms_that_are_not_worked_out_flush_everything() {
        // Relative to the instruction; an absolute address; with %gs.
        for bytes in [
            &[0x0f, 0x01, 0x3d, 1, 2, 3, 4][..],
            &[0x0f, 0x01, 0x3c, 0x25, 1, 2, 3, 4],
            &[0x65, 0x0f, 0x01, 0x38],
        ] {
            assert_eq!(Instruction::decode(bytes), Some(Instruction::FlushAll));
        }
    }

    #[test]
    fn others_are_none_of_these() {
        for bytes in [
            &[0x90][..],
            &[0x0f, 0x20, 0xd8],       // mov %cr3,%rax
            &[0x44, 0x0f, 0x22, 0xc0], // mov %rax,%cr8
            &[0x0f, 0x22, 0xd0],       // mov %rax,%cr2
            &[0x0f, 0x01, 0xf8],       // swapgs
            &[0x0f, 0x01, 0x18],       // lidt (%rax)
            &[0x0f, 0x38, 0x82, 0x00], // without its prefix
            &[],
            &[0x0f],
            &[0x0f, 0x01],
            &[0x66, 0x66],
        ] {
            assert_eq!(Instruction::decode(bytes), None, "{bytes:x?}");
        }
    }

    #[test]
    fn packing_loses_nothing() {
        for instruction in [
            Instruction::WriteCr3,
            Instruction::FlushAll,
            page(15, None, 0, i32::MIN).expect("one"),
            page(0, Some(15), 3, -1).expect("one"),
            page(7, Some(0), 1, 0x7fff_ffff).expect("one"),
        ] {
            assert_eq!(Instruction::unpack(instruction.pack()), instruction);
        }
    }
}
